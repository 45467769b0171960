//! Standard output and standard error, and the formats for programs.

use std::io::{self, ErrorKind, Write};

use serde::Serialize;

use super::args::DataFormat;
use super::error::Error;

/// Writes to standard output. A reader that has seen enough, such as `head`, is not an error.
pub(super) fn print(text: &str) -> Result<(), Error> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(source) if source.kind() != ErrorKind::BrokenPipe => Err(Error::Print { source }),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Writes a line to standard output.
pub(super) fn say(line: &str) -> Result<(), Error> {
    print(&format!("{line}\n"))
}

/// Writes a line to standard error. There is nobody to tell when that fails.
pub(super) fn complain(line: &str) {
    let _nobody_to_tell = writeln!(io::stderr(), "{line}");
}

/// The value as a program reads it, with a newline at the end.
pub(super) fn data(value: &impl Serialize, format: DataFormat) -> Result<String, Error> {
    let text = match format {
        DataFormat::Json => {
            serde_json::to_string_pretty(value).map_err(|source| Error::Encode { source: source.into() })
        }
        DataFormat::Yaml => {
            serde_saphyr::to_string(value).map_err(|source| Error::Encode { source: source.into() })
        }
    };
    text.map(|text| format!("{}\n", text.trim_end()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn data_ends_with_one_newline() {
        let value = json!({ "name": "db" });
        assert_eq!(data(&value, DataFormat::Json).unwrap(), "{\n  \"name\": \"db\"\n}\n");
        assert_eq!(data(&value, DataFormat::Yaml).unwrap(), "name: db\n");
    }
}
