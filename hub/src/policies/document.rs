//! Reads YAML into values, and remembers where each of them is: who checks them later can say it.

use std::collections::BTreeMap;
use std::fmt::{self, Formatter};

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use serde_saphyr::{Location, Spanned};

/// A place in a file, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The line.
    pub line: u64,
    /// The column, characters.
    pub column: u64,
}

impl Place {
    fn of(location: Location) -> Self {
        // Where it is not known, the file's beginning is.
        Self { line: location.line().max(1), column: location.column().max(1) }
    }
}

/// What is wrong somewhere, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Flaw {
    pub(super) place: Place,
    pub(super) message: String,
}

/// One document of a file.
#[derive(Debug)]
pub(super) struct Document {
    /// Without nulls: as in manifests, a field without a value is an absent one.
    pub(super) value: Value,
    /// By JSON pointer (RFC 6901): of a field, its name's.
    places: BTreeMap<String, Place>,
}

impl Document {
    /// Where a value is, or else what it would be in.
    pub(super) fn place(&self, pointer: &str) -> Place {
        let mut pointer = pointer;
        loop {
            if let Some(place) = self.places.get(pointer) {
                return *place;
            }
            let Some((parent, _)) = pointer.rsplit_once('/') else { return Place { line: 1, column: 1 } };
            pointer = parent;
        }
    }
}

/// The documents of a file; empty ones are none.
pub(super) fn documents(text: &str) -> Result<Vec<Document>, Flaw> {
    let trees: Vec<Spanned<Tree>> = serde_saphyr::from_multiple(text).map_err(|err| Flaw {
        place: err.location().map_or(Place { line: 1, column: 1 }, Place::of),
        message: format!("it is no YAML: {}", err.without_snippet()),
    })?;
    let documents = trees.into_iter().map(|tree| {
        let mut places = BTreeMap::new();
        places.insert(String::new(), Place::of(tree.referenced));
        let value = tree.value.into_value("", &mut places);
        Document { value, places }
    });
    Ok(documents.filter(|document| !document.value.is_null()).collect())
}

/// YAML as it is written.
#[derive(Debug)]
enum Tree {
    Leaf(Value),
    List(Vec<Spanned<Tree>>),
    Table(Vec<(Spanned<String>, Spanned<Tree>)>),
}

impl Tree {
    fn into_value(self, pointer: &str, places: &mut BTreeMap<String, Place>) -> Value {
        match self {
            Self::Leaf(value) => value,
            Self::List(items) => {
                let items = items.into_iter().enumerate().map(|(at, item)| {
                    let pointer = format!("{pointer}/{at}");
                    places.insert(pointer.clone(), Place::of(item.referenced));
                    item.value.into_value(&pointer, places)
                });
                Value::Array(items.collect())
            }
            Self::Table(fields) => {
                let mut table = Map::new();
                for (key, value) in fields {
                    let pointer = format!("{pointer}/{}", key.value.replace('~', "~0").replace('/', "~1"));
                    places.insert(pointer.clone(), Place::of(key.referenced));
                    let value = value.value.into_value(&pointer, places);
                    if !value.is_null() {
                        table.insert(key.value, value);
                    }
                }
                Value::Object(table)
            }
        }
    }
}

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyTree)
    }
}

struct AnyTree;

impl<'de> Visitor<'de> for AnyTree {
    type Value = Tree;

    fn expecting(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        formatter.write_str("a value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Tree, E> {
        Ok(Tree::Leaf(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Tree, E> {
        Ok(Tree::Leaf(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Tree, E> {
        Ok(Tree::Leaf(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Tree, E> {
        // What JSON cannot say no field takes.
        Ok(Tree::Leaf(Number::from_f64(value).map_or_else(|| value.to_string().into(), Value::Number)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Tree, E> {
        Ok(Tree::Leaf(value.into()))
    }

    fn visit_unit<E>(self) -> Result<Tree, E> {
        Ok(Tree::Leaf(Value::Null))
    }

    fn visit_none<E>(self) -> Result<Tree, E> {
        Ok(Tree::Leaf(Value::Null))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Tree, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Tree::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Tree, A::Error> {
        let mut table = Vec::new();
        while let Some(field) = fields.next_entry()? {
            table.push(field);
        }
        Ok(Tree::Table(table))
    }
}
