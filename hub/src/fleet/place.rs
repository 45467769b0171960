//! What a cluster is to have, and what its agent is sent for that. Pure.
//!
//! Absence deletes nothing: a policy is removed from a cluster only by a tombstone, which says that it was placed there once
//! and is not any more.

use std::collections::BTreeMap;

use sts_backup_api::link::{Desired, Upsert, set_hash};

use crate::store::{Body, Placed};

/// How much of bodies one message carries, bytes. Its limit is larger, and names and hashes come on top.
const CHUNK: usize = 512 << 10;

/// What is placed on a cluster that is to have these policies; none: what is placed already.
pub fn next<'a>(placed: &Placed, wanted: impl Iterator<Item = (&'a str, &'a Body)>) -> Option<Placed> {
    let mut next: Placed = placed.keys().map(|name| (name.clone(), None)).collect();
    next.extend(wanted.map(|(name, body)| (name.to_owned(), Some(body.clone()))));
    (next != *placed).then_some(next)
}

/// How many policies a cluster is to have, and the hash over all of them.
#[must_use]
pub fn set(placed: &Placed) -> (usize, Vec<u8>) {
    let present = || placed.iter().filter_map(|(name, body)| Some((&**name, body.as_ref()?)));
    (present().count(), set_hash(present().map(|(name, body)| (name, &*body.hash))))
}

/// What an agent has, and what it does not take, by name and hash.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// What it has.
    pub have: BTreeMap<String, Vec<u8>>,
    /// What it refused: the same is not sent twice.
    pub rejected: BTreeMap<String, Vec<u8>>,
    /// The newest revision that it has answered.
    pub answered: Option<u64>,
}

/// What is sent next to an agent that knows this; none: nothing is missing.
#[must_use]
pub fn offer(placed: &Placed, known: &Known, revision: u64, confirmed: u64) -> Option<Desired> {
    let is_missing = |name: &str, body: &Body| {
        known.have.get(name) != Some(&body.hash) && known.rejected.get(name) != Some(&body.hash)
    };
    let mut room = CHUNK;
    let mut upserts = Vec::new();
    for (name, body) in placed {
        let Some(body) = body.as_ref().filter(|body| is_missing(name, body)) else { continue };
        // At least one, whatever its size.
        if !upserts.is_empty() && body.json.len() > room {
            break;
        }
        room = room.saturating_sub(body.json.len());
        upserts.push(Upsert { name: name.clone(), hash: body.hash.clone(), body: body.json.to_vec() });
    }
    let is_gone = |name: &&String| placed.get(*name).is_some_and(Option::is_none);
    let removes: Vec<_> = known.have.keys().filter(is_gone).cloned().collect();
    let is_known = known.answered == Some(revision) || placed.is_empty();
    if upserts.is_empty() && removes.is_empty() && is_known {
        return None;
    }
    let (total, set_hash) = set(placed);
    let total = u32::try_from(total).unwrap_or(u32::MAX);
    Some(Desired { revision, set_hash, total, upserts, removes, confirmed: revision <= confirmed })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn body(text: &str) -> Body {
        Body { hash: text.as_bytes().to_vec(), json: Arc::from(text.as_bytes()) }
    }

    fn placed(items: &[(&str, Option<&str>)]) -> Placed {
        items.iter().map(|(name, text)| ((*name).to_owned(), text.map(body))).collect()
    }

    fn known(have: &[(&str, &str)]) -> Known {
        let have = have.iter().map(|(name, hash)| ((*name).to_owned(), hash.as_bytes().to_vec()));
        Known { have: have.collect(), rejected: BTreeMap::new(), answered: Some(1) }
    }

    fn names(desired: Option<Desired>) -> Option<(Vec<String>, Vec<String>)> {
        desired.map(|desired| (desired.upserts.into_iter().map(|item| item.name).collect(), desired.removes))
    }

    #[test]
    fn what_is_not_wanted_any_more_becomes_a_tombstone_and_comes_back_as_a_policy() {
        let (a, b) = (body("a"), body("b"));
        let first = next(&Placed::new(), [("a", &a), ("b", &b)].into_iter()).unwrap();
        assert_eq!(next(&first, [("a", &a), ("b", &b)].into_iter()), None);
        let second = next(&first, [("b", &b)].into_iter()).unwrap();
        assert_eq!(second, placed(&[("a", None), ("b", Some("b"))]));
        assert_eq!(next(&second, [("b", &b)].into_iter()), None, "a tombstone stays");
        assert_eq!(next(&second, [("a", &a), ("b", &b)].into_iter()), Some(first));
    }

    #[test]
    fn an_agent_is_sent_what_it_lacks_and_told_only_of_tombstones() {
        let placed = placed(&[("a", Some("a")), ("b", Some("b2")), ("gone", None), ("never", None)]);
        let knows = known(&[("a", "a"), ("b", "b1"), ("gone", "x"), ("unknown", "y")]);
        let (upserts, removes) = names(offer(&placed, &knows, 1, 0)).unwrap();
        assert_eq!((upserts, removes), (vec!["b".to_owned()], vec!["gone".to_owned()]));
    }

    #[test]
    fn what_was_refused_is_not_sent_again_until_it_is_another_one() {
        let mut knows = known(&[]);
        knows.rejected.insert("a".to_owned(), b"bad".to_vec());
        assert_eq!(names(offer(&placed(&[("a", Some("bad"))]), &knows, 1, 0)), None);
        let (upserts, _) = names(offer(&placed(&[("a", Some("good"))]), &knows, 1, 0)).unwrap();
        assert_eq!(upserts, ["a"]);
    }

    #[test]
    fn a_new_revision_is_told_even_where_nothing_is_missing() {
        let placed = placed(&[("a", Some("a"))]);
        let knows = known(&[("a", "a")]);
        assert_eq!(offer(&placed, &knows, 1, 0), None);
        let desired = offer(&placed, &knows, 2, 2).unwrap();
        assert_eq!((desired.upserts.len(), desired.revision, desired.confirmed), (0, 2, true));
    }

    #[test]
    fn a_hub_that_has_nothing_for_a_cluster_says_nothing() {
        assert_eq!(offer(&Placed::new(), &Known { answered: None, ..known(&[("a", "a")]) }, 0, 0), None);
    }

    #[test]
    fn large_sets_come_in_pieces_that_fit() {
        let large = "x".repeat(200 << 10);
        let all: Vec<_> = (0..10).map(|at| (format!("p{at}"), format!("{at}{large}"))).collect();
        let items: Vec<_> = all.iter().map(|(name, text)| (&**name, Some(&**text))).collect();
        let placed = placed(&items);
        let mut knows = known(&[]);
        let mut messages = 0;
        while let Some(desired) = offer(&placed, &knows, 1, 0) {
            let size: usize = desired.upserts.iter().map(|item| item.body.len()).sum();
            assert!(size <= CHUNK, "{size}");
            knows.have.extend(desired.upserts.into_iter().map(|item| (item.name, item.hash)));
            messages += 1;
        }
        assert_eq!((messages, knows.have.len()), (5, 10));
    }
}
