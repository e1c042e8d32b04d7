//! Dashboards, and their queries as Grafana sends them.

use std::path::Path;

use serde_json::Value;

use super::Prometheus;

/// What Grafana knows by itself, for the last minutes of a Prometheus that pulls every second.
const BUILT_IN: [(&str, &str); 3] = [("__rate_interval", "10s"), ("__interval", "2s"), ("__range", "5m")];

/// A dashboard's JSON, and the name of its file.
pub struct Dashboard {
    pub name: String,
    pub json: Value,
}

/// What is chosen of a variable that can have all of its values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Choice {
    All,
    /// The first.
    One,
}

/// One query of a panel, with nothing left to choose.
#[derive(Debug)]
pub struct Query {
    /// Where it stands.
    pub place: String,
    pub expression: String,
    /// Labels that the legend names.
    pub legend: Vec<String>,
    /// What the panel says of itself.
    pub description: String,
    /// A graph asks for a range; a table for what is.
    pub is_graph: bool,
}

/// The elements of an array; none where there is none.
pub fn each(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

pub fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

impl Dashboard {
    /// Those of a folder of this repository.
    pub fn all(folder: &str) -> Vec<Self> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
        let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        let read = |path: &std::path::PathBuf| Self {
            name: path.file_stem().unwrap().to_string_lossy().into_owned(),
            json: serde_json::from_slice(&std::fs::read(path).unwrap())
                .unwrap_or_else(|error| panic!("{}: {error}", path.display())),
        };
        paths.iter().map(read).collect()
    }

    pub fn panels(&self) -> impl Iterator<Item = &Value> {
        each(&self.json["panels"])
    }

    /// The variables that are filled by a query.
    pub fn variables(&self) -> impl Iterator<Item = &Value> {
        each(&self.json["templating"]["list"]).filter(|variable| variable["type"] == "query")
    }

    /// Its variables' values, each chosen among what Prometheus knows under those before it.
    ///
    /// Fails where there is nothing to choose from.
    pub async fn choose(&self, prometheus: &Prometheus, choice: Choice) -> Result<Vec<(String, String)>, String> {
        let mut chosen = Vec::new();
        for variable in self.variables() {
            let (name, query) = (text(&variable["name"]), text(&variable["query"]["query"]));
            let query = filled(query, &chosen);
            let (selector, label) = query
                .strip_prefix("label_values(")
                .and_then(|query| query.strip_suffix(')')?.rsplit_once(", "))
                .ok_or_else(|| format!("{} ${name}: no label_values(selector, label): {query}", self.name))?;
            let values = prometheus.label_values(selector, label).await;
            let values = values.map_err(|error| format!("{} ${name}: {error}: {query}", self.name))?;
            let first = values.into_iter().next();
            let first = first.ok_or_else(|| format!("{} ${name}: nothing to choose from: {query}", self.name))?;
            let all = text(&variable["allValue"]).to_owned();
            let takes_all = choice == Choice::All && variable["includeAll"] == true;
            chosen.push((name.to_owned(), if takes_all { all } else { first }));
        }
        Ok(chosen)
    }

    /// The queries of its panels, with those values of its variables.
    pub fn queries(&self, chosen: &[(String, String)]) -> Vec<Query> {
        let of_panel = |panel: &Value| {
            let title = format!("{} / {}", self.name, text(&panel["title"]));
            let description = text(&panel["description"]).to_owned();
            let is_graph = panel["type"] == "timeseries";
            let query = move |target: &Value| Query {
                place: format!("{title} [{}] {chosen:?}", text(&target["refId"])),
                expression: filled(text(&target["expr"]), chosen),
                legend: labels(text(&target["legendFormat"])),
                description: description.clone(),
                is_graph,
            };
            each(&panel["targets"]).map(query).collect::<Vec<_>>()
        };
        self.panels().flat_map(of_panel).collect()
    }
}

/// Longer names go first: one may begin with another.
fn filled(query: &str, chosen: &[(String, String)]) -> String {
    let chosen = chosen.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let mut values: Vec<_> = BUILT_IN.into_iter().chain(chosen).collect();
    values.sort_by_key(|(name, _)| std::cmp::Reverse(name.len()));
    values.iter().fold(query.to_owned(), |query, (name, value)| {
        query.replace(&format!("${{{name}}}"), value).replace(&format!("${name}"), value)
    })
}

/// The names between double braces.
fn labels(legend: &str) -> Vec<String> {
    let parts = legend.split("{{").skip(1);
    parts.filter_map(|part| Some(part.split_once("}}")?.0.trim().to_owned())).collect()
}
