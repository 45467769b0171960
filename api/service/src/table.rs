//! Tables, ages, spans and sizes as kubectl's users know them.

use std::time::Duration;

use comfy_table::Table;
use comfy_table::presets::NOTHING;
use jiff::Timestamp;

/// Columns three spaces apart, no lines, no trailing spaces: as kubectl prints them.
#[must_use]
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(header.iter().copied());
    table.add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 3));
    }
    lines(table.lines().map(|line| line.trim_end().to_owned()))
}

/// A text of these lines, each with its newline.
#[must_use]
pub fn lines(lines: impl IntoIterator<Item = String>) -> String {
    lines.into_iter().flat_map(|line| [line, "\n".to_owned()]).collect()
}

/// Every line of `text`, two spaces further in.
#[must_use]
pub fn indented(text: &str) -> String {
    lines(text.lines().map(|line| format!("  {line}")))
}

/// How long ago, as kubectl writes it:
/// <https://github.com/kubernetes/apimachinery/blob/master/pkg/util/duration/duration.go> (`HumanDuration`).
#[must_use]
pub fn age(since: Timestamp, now: Timestamp) -> String {
    let seconds = now.as_second() - since.as_second();
    // The clocks of a cluster and its users differ a little.
    if seconds < -1 {
        return "<invalid>".to_owned();
    }
    let seconds = seconds.max(0);
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    let (years, rest_of_year) = (days / 365, days % 365);
    let two = |first: i64, unit: char, second: i64, sub: char| {
        if second == 0 { format!("{first}{unit}") } else { format!("{first}{unit}{second}{sub}") }
    };
    match seconds {
        ..120 => format!("{seconds}s"),
        120..600 => two(minutes, 'm', seconds % 60, 's'),
        600..10_800 => format!("{minutes}m"),
        10_800..28_800 => two(hours, 'h', minutes % 60, 'm'),
        28_800..172_800 => format!("{hours}h"),
        172_800..691_200 => two(days, 'd', hours % 24, 'h'),
        691_200..63_072_000 => format!("{days}d"),
        63_072_000..252_288_000 => two(years, 'y', rest_of_year, 'd'),
        252_288_000.. => format!("{years}y"),
    }
}

/// The moment to the second, and how long ago it was.
#[must_use]
pub fn moment(at: Timestamp, now: Timestamp) -> String {
    format!("{} ({} ago)", second(at), age(at, now))
}

/// The moment to the second.
#[must_use]
pub fn second(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// A span of milliseconds: `120 ms`, `2.1 s`, `3 min 5 s`, `1 h 2 min`.
#[must_use]
pub fn span(milliseconds: i64) -> String {
    let seconds = milliseconds / 1000;
    match milliseconds {
        ..1000 => format!("{milliseconds} ms"),
        1000..60_000 => format!("{seconds}.{} s", milliseconds % 1000 / 100),
        60_000..3_600_000 => format!("{} min {} s", seconds / 60, seconds % 60),
        3_600_000.. => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}

/// As [`span`].
#[must_use]
pub fn duration(duration: Duration) -> String {
    span(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX))
}

/// Bytes as Kubernetes writes them, to a tenth: `512`, `30Mi`, `1.5Gi`.
#[must_use]
pub fn size(bytes: i64) -> String {
    const UNITS: [&str; 6] = ["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let bytes = bytes.max(0);
    let Some(unit) = (1..=6).rev().find(|power| bytes >> (10 * power) > 0) else {
        return bytes.to_string();
    };
    // Rounding down to a tenth; 128 bits hold ten times any size.
    let tenths = (i128::from(bytes) * 10) >> (10 * unit);
    let name = UNITS[unit - 1];
    match (tenths / 10, tenths % 10) {
        (whole, 0) => format!("{whole}{name}"),
        (whole, tenth) => format!("{whole}.{tenth}{name}"),
    }
}

/// `1 volume`, `3 volumes`.
#[must_use]
pub fn count(number: usize, noun: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {noun}{plural}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_look_like_kubectl_s() {
        let rows = [
            vec!["nightly".to_owned(), "db".to_owned(), String::new()],
            vec!["a".to_owned(), "a-long-name".to_owned(), "3".to_owned()],
        ];
        assert_eq!(
            table(&["NAME", "STATEFULSET", "POINTS"], &rows),
            "NAME      STATEFULSET   POINTS\n\
             nightly   db\n\
             a         a-long-name   3\n"
        );
    }

    #[test]
    fn ages_are_kubectl_s() {
        let at = |second| Timestamp::from_second(second).unwrap();
        for (seconds, text) in [
            (-5, "<invalid>"),
            (-1, "0s"),
            (119, "119s"),
            (120, "2m"),
            (599, "9m59s"),
            (3600, "60m"),
            (3 * 3600, "3h"),
            (3 * 3600 + 1260, "3h21m"),
            (8 * 3600, "8h"),
            (49 * 3600, "2d1h"),
            (8 * 86_400, "8d"),
            (800 * 86_400, "2y70d"),
            (3000 * 86_400, "8y"),
        ] {
            assert_eq!(age(at(0), at(seconds)), text, "{seconds}");
        }
    }

    #[test]
    fn spans_and_sizes_have_their_unit() {
        for (milliseconds, text) in
            [(0, "0 ms"), (999, "999 ms"), (2140, "2.1 s"), (185_000, "3 min 5 s"), (3_720_000, "1 h 2 min")]
        {
            assert_eq!(span(milliseconds), text);
        }
        for (bytes, text) in [
            (0, "0"),
            (1023, "1023"),
            (1024, "1Ki"),
            (30 << 20, "30Mi"),
            (3 << 29, "1.5Gi"),
            (i64::MAX, "7.9Ei"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn nouns_have_their_plural() {
        assert_eq!((count(1, "volume"), count(0, "volume")), ("1 volume".to_owned(), "0 volumes".to_owned()));
    }
}
