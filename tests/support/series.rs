//! A Prometheus exposition, read back.

use std::collections::BTreeMap;

/// A series: its name, its labels by name, its value.
pub type Row = (String, Vec<(String, String)>, f64);

/// The text of one pull.
#[derive(Debug, Clone)]
pub struct Exposition {
    pub text: String,
    series: Vec<Series>,
}

#[derive(Debug, Clone)]
struct Series {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

impl Exposition {
    pub fn parse(text: String) -> Self {
        let series = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).map(parse_line).collect();
        Self { text, series }
    }

    /// What came another way than by a pull.
    pub fn of(rows: impl IntoIterator<Item = Row>) -> Self {
        let series =
            rows.into_iter().map(|(name, labels, value)| Series { name, labels: labels.into_iter().collect(), value });
        Self { text: String::new(), series: series.collect() }
    }

    /// Under other names and labels.
    pub fn renamed(mut self, rename: impl Fn(&mut String, &mut BTreeMap<String, String>)) -> Self {
        for Series { name, labels, .. } in &mut self.series {
            rename(name, labels);
        }
        self
    }

    /// The value of the one series of that name and with at least those labels; `None` where there is none.
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let found: Vec<_> = self.matching(name, labels).collect();
        assert!(found.len() <= 1, "{name} {labels:?} is ambiguous: {found:?}");
        found.first().map(|series| series.value)
    }

    /// The values of all series of that name and with at least those labels.
    pub fn values(&self, name: &str, labels: &[(&str, &str)]) -> Vec<f64> {
        self.matching(name, labels).map(|series| series.value).collect()
    }

    /// Every value that a label has on any series.
    pub fn label_values(&self, label: &str) -> Vec<String> {
        let mut values: Vec<_> = self.series.iter().filter_map(|series| series.labels.get(label).cloned()).collect();
        values.sort();
        values.dedup();
        values
    }

    /// Series by name and labels, sorted: to be compared with what came another way.
    pub fn sorted(&self, prefix: &str) -> Vec<Row> {
        let mut rows: Vec<_> = self
            .series
            .iter()
            .filter(|series| series.name.starts_with(prefix))
            .map(|series| (series.name.clone(), series.labels.clone().into_iter().collect(), series.value))
            .collect();
        rows.sort_by(|one: &Row, other| (&one.0, &one.1).cmp(&(&other.0, &other.1)));
        rows
    }

    /// Which series there are, whatever their values.
    pub fn keys(&self) -> Vec<(String, Vec<(String, String)>)> {
        let rows = self.sorted("").into_iter();
        rows.map(|(name, labels, _)| (name, labels)).collect()
    }

    fn matching<'a>(&'a self, name: &'a str, labels: &'a [(&str, &str)]) -> impl Iterator<Item = &'a Series> {
        let has =
            |series: &Series, (key, value): &(&str, &str)| series.labels.get(*key).is_some_and(|has| has == value);
        self.series.iter().filter(move |series| series.name == name && labels.iter().all(|label| has(series, label)))
    }
}

/// What is to be seen and is not, and what is seen instead.
pub fn same(seen: &[Row], expected: &[Row]) -> Result<(), String> {
    let only = |of: &[Row], other: &[Row], sign| {
        let rows = of.iter().filter(|row| !other.contains(row));
        rows.map(|(name, labels, value)| format!("{sign} {name}{labels:?} {value}")).collect::<Vec<_>>()
    };
    if seen == expected {
        return Ok(());
    }
    Err([only(expected, seen, "-"), only(seen, expected, "+")].concat().join("\n"))
}

/// Labels that the tests use hold no quotes or commas.
fn parse_line(line: &str) -> Series {
    let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no value: {line}"));
    let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
    let labels = labels.trim_end_matches('}').split("\",").filter(|label| !label.is_empty()).map(|label| {
        let (key, value) = label.split_once('=').unwrap_or_else(|| panic!("no label: {line}"));
        (key.to_owned(), value.trim_matches('"').to_owned())
    });
    Series { name: name.to_owned(), labels: labels.collect(), value: value.parse().unwrap() }
}

/// The labels of a worker of the default target.
pub fn worker(id: &str) -> [(&str, &str); 3] {
    [("component", "backend"), ("endpoint", "generate"), ("worker_id", id)]
}
