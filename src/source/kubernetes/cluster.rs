//! Who is there: worker resources joined with the readiness of their pods. No I/O.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::DynamicObject;
use serde_json::Value;

/// Maps of a resource, and where etcd has what is in them.
const MAPS: [(&str, &str); 3] =
    [("endpoints", "v1/instances/"), ("model_cards", "v1/mdc/"), ("event_channels", "v1/event_channels/")];

/// The container whose resource has the name of its pod alone.
const MAIN_CONTAINER: &str = "main";

/// What a worker registers of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Resource {
    /// The pod that it belongs to, by uid: a later pod of the same name is another.
    pub(super) owner: Option<String>,
    /// Key paths in etcd's layout, and JSON values.
    pub(super) entries: Vec<(String, Vec<u8>)>,
    /// What in it is not as it should be.
    pub(super) faults: Vec<&'static str>,
}

/// What a slice says of a pod, or a pod of one of its containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Endpoint {
    /// The resource that is meant.
    pub(super) resource: String,
    pub(super) pod: Arc<str>,
    pub(super) uid: String,
    pub(super) ready: bool,
}

/// A resource whose pod is known.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Joined<'a> {
    pub(super) entries: &'a [(String, Vec<u8>)],
    pub(super) pod: Arc<str>,
    pub(super) ready: bool,
}

/// The last that was heard of every object, by name; all are of one Kubernetes namespace.
#[derive(Debug, Default)]
pub(super) struct Cluster {
    resources: HashMap<String, Resource>,
    /// By the slice or pod that says so.
    endpoints: HashMap<String, Vec<Endpoint>>,
    /// The slices or pods that say something of a resource.
    said_by: HashMap<String, BTreeSet<String>>,
    /// Resources to look at again.
    stale: BTreeSet<String>,
}

impl Cluster {
    /// Whether that is news.
    pub(super) fn put_resource(&mut self, name: String, resource: Resource) -> bool {
        if self.resources.get(&name) == Some(&resource) {
            return false;
        }
        self.stale.insert(name.clone());
        self.resources.insert(name, resource);
        true
    }

    pub(super) fn remove_resource(&mut self, name: &str) {
        if self.resources.remove(name).is_some() {
            self.stale.insert(name.to_owned());
        }
    }

    /// After a complete list: every other one is gone.
    pub(super) fn retain_resources(&mut self, kept: &HashSet<&str>) {
        let gone: Vec<_> = self.resources.keys().filter(|name| !kept.contains(name.as_str())).cloned().collect();
        for name in gone {
            self.remove_resource(&name);
        }
    }

    pub(super) fn put_endpoints(&mut self, object: String, endpoints: Vec<Endpoint>) {
        if self.endpoints.get(&object) == Some(&endpoints) {
            return;
        }
        self.remove_endpoints(&object);
        for Endpoint { resource, .. } in &endpoints {
            self.said_by.entry(resource.clone()).or_default().insert(object.clone());
            self.stale.insert(resource.clone());
        }
        self.endpoints.insert(object, endpoints);
    }

    pub(super) fn remove_endpoints(&mut self, object: &str) {
        for Endpoint { resource, .. } in self.endpoints.remove(object).unwrap_or_default() {
            if let Some(objects) = self.said_by.get_mut(&resource) {
                objects.remove(object);
                if objects.is_empty() {
                    self.said_by.remove(&resource);
                }
            }
            self.stale.insert(resource);
        }
    }

    /// After a complete list: every other one is gone.
    pub(super) fn retain_endpoints(&mut self, kept: &HashSet<&str>) {
        let gone: Vec<_> = self.endpoints.keys().filter(|name| !kept.contains(name.as_str())).cloned().collect();
        for object in gone {
            self.remove_endpoints(&object);
        }
    }

    /// Names of the resources that may have changed their standing since the last call.
    pub(super) fn take_stale(&mut self) -> BTreeSet<String> {
        std::mem::take(&mut self.stale)
    }

    /// A resource is alive if the very pod that owns it is an endpoint, and ready if it is so anywhere.
    pub(super) fn join(&self, name: &str) -> Option<Joined<'_>> {
        let resource = self.resources.get(name)?;
        let owner = resource.owner.as_deref()?;
        let said = self.said_by.get(name)?.iter().filter_map(|object| self.endpoints.get(object)).flatten();
        let mut own = said.filter(|endpoint| endpoint.resource == name && endpoint.uid == owner);
        let first = own.next()?;
        let ready = first.ready || own.any(|endpoint| endpoint.ready);
        Some(Joined { entries: &resource.entries, pod: Arc::clone(&first.pod), ready })
    }
}

/// What a worker's resource says. A map that is none costs itself.
pub(super) fn read_resource(object: DynamicObject) -> Resource {
    let owners = object.metadata.owner_references.unwrap_or_default();
    let mut resource = Resource {
        owner: owners.into_iter().find(|owner| owner.kind == "Pod").map(|owner| owner.uid),
        ..Resource::default()
    };
    let mut data = match object.data.pointer("/spec/data") {
        None | Some(Value::Null) => return resource,
        Some(Value::Object(data)) => data.clone(),
        Some(_) => {
            resource.faults.push("data");
            return resource;
        }
    };
    for (map, prefix) in MAPS {
        match data.remove(map) {
            None | Some(Value::Null) => {}
            Some(Value::Object(entries)) => {
                let entries =
                    entries.into_iter().map(|(key, value)| (format!("{prefix}{key}"), value.to_string().into_bytes()));
                resource.entries.extend(entries);
            }
            Some(_) => resource.faults.push(map),
        }
    }
    resource
}

/// The pods of a slice. One whose readiness is not told is not ready, as Dynamo has it.
pub(super) fn read_slice(slice: EndpointSlice) -> Vec<Endpoint> {
    let endpoint = |endpoint: k8s_openapi::api::discovery::v1::Endpoint| {
        let pod = endpoint.target_ref.filter(|target| target.kind.as_deref().is_none_or(|kind| kind == "Pod"))?;
        let (name, uid) = pod.name.zip(pod.uid)?;
        let ready = endpoint.conditions.and_then(|conditions| conditions.ready).unwrap_or_default();
        Some(Endpoint { resource: name.clone(), pod: name.into(), uid, ready })
    };
    slice.endpoints.into_iter().flatten().filter_map(endpoint).collect()
}

/// The containers of a pod.
pub(super) fn read_pod(pod: Pod) -> Vec<Endpoint> {
    let Some((name, uid)) = pod.metadata.name.zip(pod.metadata.uid) else { return Vec::new() };
    let shared: Arc<str> = name.as_str().into();
    let containers = pod.status.and_then(|status| status.container_statuses).unwrap_or_default();
    let endpoint = |container: k8s_openapi::api::core::v1::ContainerStatus| {
        let resource =
            if container.name == MAIN_CONTAINER { name.clone() } else { format!("{name}-{}", container.name) };
        Endpoint { resource, pod: Arc::clone(&shared), uid: uid.clone(), ready: container.ready }
    };
    containers.into_iter().map(endpoint).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn resource(uid: &str) -> Resource {
        Resource {
            owner: Some(uid.to_owned()),
            entries: vec![("v1/instances/a".to_owned(), b"1".to_vec())],
            ..Resource::default()
        }
    }

    fn endpoint(name: &str, uid: &str, ready: bool) -> Endpoint {
        Endpoint { resource: name.to_owned(), pod: name.into(), uid: uid.to_owned(), ready }
    }

    /// `None` where it is nobody.
    fn is_ready(cluster: &Cluster, name: &str) -> Option<bool> {
        cluster.join(name).map(|joined| joined.ready)
    }

    #[test]
    fn a_worker_is_a_resource_whose_own_pod_is_an_endpoint() {
        let mut cluster = Cluster::default();
        cluster.put_resource("w0".to_owned(), resource("uid-0"));
        assert_eq!(is_ready(&cluster, "w0"), None, "no endpoint");
        cluster.put_endpoints("slice".to_owned(), vec![endpoint("w0", "uid-of-its-successor", true)]);
        assert_eq!(is_ready(&cluster, "w0"), None, "another pod of that name");
        cluster.put_endpoints("slice".to_owned(), vec![endpoint("w0", "uid-0", false)]);
        assert_eq!(is_ready(&cluster, "w0"), Some(false));
        cluster.put_endpoints("slice".to_owned(), vec![endpoint("w0", "uid-0", true)]);
        let joined = cluster.join("w0").unwrap();
        assert_eq!((joined.ready, &*joined.pod, joined.entries.len()), (true, "w0", 1));
        cluster.remove_resource("w0");
        assert_eq!(is_ready(&cluster, "w0"), None, "no resource");
    }

    #[test]
    fn a_pod_that_is_ready_in_one_slice_is_ready() {
        let mut cluster = Cluster::default();
        cluster.put_resource("w0".to_owned(), resource("uid-0"));
        cluster.put_endpoints("one".to_owned(), vec![endpoint("w0", "uid-0", false)]);
        cluster.put_endpoints("other".to_owned(), vec![endpoint("w0", "uid-0", true), endpoint("w1", "uid-1", true)]);
        assert_eq!(is_ready(&cluster, "w0"), Some(true));
        cluster.remove_endpoints("other");
        assert_eq!(is_ready(&cluster, "w0"), Some(false));
        cluster.remove_endpoints("one");
        assert_eq!(is_ready(&cluster, "w0"), None);
        assert!(cluster.said_by.is_empty());
    }

    #[test]
    fn a_resource_without_an_owner_is_nobody() {
        let mut cluster = Cluster::default();
        cluster.put_resource("w0".to_owned(), Resource { owner: None, ..resource("") });
        cluster.put_endpoints("slice".to_owned(), vec![endpoint("w0", "", true)]);
        assert_eq!(is_ready(&cluster, "w0"), None);
    }

    #[test]
    fn only_what_changed_is_looked_at_again() {
        let mut cluster = Cluster::default();
        assert!(cluster.put_resource("w0".to_owned(), resource("uid-0")));
        cluster.put_endpoints("slice".to_owned(), vec![endpoint("w1", "uid-1", true), endpoint("w2", "uid-2", true)]);
        assert_eq!(cluster.take_stale().into_iter().collect::<Vec<_>>(), ["w0", "w1", "w2"]);
        assert!(!cluster.put_resource("w0".to_owned(), resource("uid-0")));
        cluster.put_endpoints("slice".to_owned(), vec![endpoint("w1", "uid-1", true), endpoint("w2", "uid-2", true)]);
        cluster.remove_endpoints("unknown");
        cluster.remove_resource("unknown");
        assert!(cluster.take_stale().is_empty());
        cluster.put_endpoints("slice".to_owned(), vec![endpoint("w1", "uid-1", true)]);
        assert!(cluster.take_stale().contains("w2"), "its endpoint is gone");
    }

    #[test]
    fn what_a_list_leaves_out_is_gone() {
        let mut cluster = Cluster::default();
        for (name, uid) in [("w0", "uid-0"), ("w1", "uid-1")] {
            cluster.put_resource(name.to_owned(), resource(uid));
            cluster.put_endpoints(name.to_owned(), vec![endpoint(name, uid, true)]);
        }
        cluster.take_stale();
        cluster.retain_resources(&HashSet::from(["w1"]));
        cluster.retain_endpoints(&HashSet::from(["w0"]));
        assert_eq!(cluster.take_stale().len(), 2);
        assert_eq!((is_ready(&cluster, "w0"), is_ready(&cluster, "w1")), (None, None));
        cluster.put_resource("w0".to_owned(), resource("uid-0"));
        assert_eq!(is_ready(&cluster, "w0"), Some(true), "its endpoint is still there");
    }

    fn read(spec: &Value) -> Resource {
        let object = json!({
            "apiVersion": "nvidia.com/v1alpha1",
            "kind": "DynamoWorkerMetadata",
            "metadata": {"name": "w0", "ownerReferences": [
                {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "r", "uid": "uid-r"},
                {"apiVersion": "v1", "kind": "Pod", "name": "w0", "uid": "uid-0"},
            ]},
            "spec": spec,
        });
        read_resource(serde_json::from_value(object).unwrap())
    }

    #[test]
    fn a_resource_holds_what_etcd_would() {
        let resource = read(&json!({"data": {
            "endpoints": {"dynamo/backend/generate/1f": {"instance_id": 18_446_744_073_709_551_615_u64}},
            "model_cards": {"dynamo/backend/generate/1f": {}},
            "event_channels": null,
            "event_sources": {"x": {}},
        }}));
        assert_eq!(resource.owner.as_deref(), Some("uid-0"));
        assert_eq!(
            resource.entries,
            [
                (
                    "v1/instances/dynamo/backend/generate/1f".to_owned(),
                    br#"{"instance_id":18446744073709551615}"#.to_vec()
                ),
                ("v1/mdc/dynamo/backend/generate/1f".to_owned(), b"{}".to_vec()),
            ]
        );
        assert!(resource.faults.is_empty());
    }

    #[test]
    fn a_map_that_is_none_costs_itself() {
        let resource = read(&json!({"data": {"endpoints": {"a": 1}, "model_cards": [1], "event_channels": "x"}}));
        assert_eq!((resource.entries.len(), resource.faults), (1, vec!["model_cards", "event_channels"]));
        assert_eq!(read(&json!({"data": "x"})).faults, ["data"]);
        for nothing in [json!({"data": null}), json!({}), json!("x"), Value::Null] {
            let resource = read(&nothing);
            assert_eq!((resource.entries.len(), resource.faults.len()), (0, 0));
        }
    }

    #[test]
    fn a_slice_names_pods_by_uid() {
        let slice = json!({
            "addressType": "IPv4",
            "endpoints": [
                {"addresses": ["192.0.2.1"], "conditions": {"ready": true}, "targetRef": {"kind": "Pod", "name": "w0", "uid": "uid-0"}},
                {"addresses": ["192.0.2.2"], "targetRef": {"kind": "Pod", "name": "w1", "uid": "uid-1"}},
                {"addresses": ["192.0.2.3"], "conditions": {"ready": true}, "targetRef": {"kind": "Pod", "name": "w2"}},
                {"addresses": ["192.0.2.4"], "conditions": {"ready": true}, "targetRef": {"kind": "Node", "name": "w3", "uid": "uid-3"}},
                {"addresses": ["192.0.2.5"], "conditions": {"ready": true}},
            ],
        });
        let endpoints = read_slice(serde_json::from_value(slice).unwrap());
        assert_eq!(endpoints, [endpoint("w0", "uid-0", true), endpoint("w1", "uid-1", false)]);
        assert_eq!(read_slice(EndpointSlice::default()), []);
    }

    #[test]
    fn each_container_of_a_pod_has_its_own_resource() {
        let status = |name, ready| json!({"name": name, "ready": ready, "image": "", "imageID": "", "restartCount": 0});
        let pod = json!({
            "metadata": {"name": "w0", "uid": "uid-0"},
            "status": {"containerStatuses": [status("main", true), status("engine-1", false)]},
        });
        let endpoints = read_pod(serde_json::from_value(pod).unwrap());
        let second = Endpoint { resource: "w0-engine-1".to_owned(), ..endpoint("w0", "uid-0", false) };
        assert_eq!(endpoints, [endpoint("w0", "uid-0", true), second]);
        assert_eq!(read_pod(Pod::default()), []);
    }
}
