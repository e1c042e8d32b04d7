//! A real Kubernetes API server of a test's own, with Dynamo's custom resource.
//!
//! There is no kubelet and there are no controllers: a pod is as ready as a test says, and what its end would delete is
//! deleted by hand.

use std::fs;
use std::path::PathBuf;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::rbac::v1::{Role, RoleBinding};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Client;
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams};
use kube::config::{Config, KubeConfigOptions, Kubeconfig};
use rcgen::KeyPair;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Command;

use super::program::told;
use super::{Authority, Etcd, Port, Program, eventually, peers};

/// The resource that Dynamo's operator defines, and its workers write.
const METADATA: (&str, &str) = ("DynamoWorkerMetadata", "dynamoworkermetadatas");
/// The token of an administrator.
const ADMIN: &str = "admin-token";
/// Kubernetes namespace of everything here.
pub const NAMESPACE: &str = "default";

/// Stopped when dropped.
pub struct Kube {
    program: Option<Program>,
    executable: PathBuf,
    etcd: Etcd,
    authority: Authority,
    certificate: (String, String),
    port: Port,
    folder: TempDir,
    client: Client,
}

impl Kube {
    /// `None` where no API server was built, with Dynamo's resource defined.
    pub async fn start() -> Option<Self> {
        let kube = Self::without_dynamo().await?;
        kube.define().await;
        Some(kube)
    }

    /// The same, where `kubectl` is too.
    pub async fn with_kubectl() -> Option<Self> {
        peers::kubectl()?;
        Self::start().await
    }

    /// As it is before Dynamo's operator is installed.
    pub async fn without_dynamo() -> Option<Self> {
        let executable = peers::built("kube-apiserver")?;
        dynamo_metrics::process::install_crypto();
        let (folder, authority) = (tempfile::tempdir().unwrap(), Authority::new());
        let key = KeyPair::generate().unwrap();
        fs::write(folder.path().join("accounts.key"), key.serialize_pem()).unwrap();
        fs::write(folder.path().join("accounts.pub"), key.public_key_pem()).unwrap();
        fs::write(folder.path().join("tokens.csv"), tokens("bridge-token")).unwrap();
        let (port, certificate) = (Port::reserve(), authority.server());
        let config = kubeconfig(&port, &authority, &json!({"token": ADMIN}));
        let config: Kubeconfig = serde_json::from_value(config).unwrap();
        let config = Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await.unwrap();
        let client = Client::try_from(config).unwrap();
        let etcd = Etcd::start().await;
        let mut kube = Self { program: None, executable, etcd, authority, certificate, port, folder, client };
        kube.resume().await;
        Some(kube)
    }

    /// Starts it again where it was: the same port, the same data.
    pub async fn resume(&mut self) {
        let path = |name: &str| self.folder.path().join(name).into_os_string();
        let mut command = Command::new(&self.executable);
        command.env_clear();
        for (option, value) in [
            ("--etcd-servers", self.etcd.url().into()),
            ("--bind-address", "127.0.0.1".into()),
            ("--advertise-address", "127.0.0.1".into()),
            ("--secure-port", self.port.number().to_string().into()),
            ("--cert-dir", path("certificates")),
            ("--tls-cert-file", self.certificate.0.clone().into()),
            ("--tls-private-key-file", self.certificate.1.clone().into()),
            ("--service-account-issuer", "https://kubernetes.default.svc".into()),
            ("--service-account-key-file", path("accounts.pub")),
            ("--service-account-signing-key-file", path("accounts.key")),
            ("--service-cluster-ip-range", "10.96.0.0/16".into()),
            ("--token-auth-file", path("tokens.csv")),
            ("--authorization-mode", "RBAC".into()),
            // Pods need no account.
            ("--disable-admission-plugins", "ServiceAccount".into()),
        ] {
            command.arg(option).arg(value);
        }
        self.program = Some(Program::start(&mut command));
        eventually("the API server is ready", || async {
            let written = || told(&self.program().lines());
            let request = axum::http::Request::get("/readyz").body(Vec::new()).unwrap();
            match self.client.request_text(request).await {
                Ok(text) if text == "ok" => Ok(()),
                Ok(text) => Err(text),
                Err(error) => Err(format!("{error}\n{}", written())),
            }
        })
        .await;
    }

    fn program(&self) -> &Program {
        self.program.as_ref().expect("it runs")
    }

    /// At once, as `kill -9` does.
    pub async fn kill(&mut self) {
        self.program.take().expect("it runs").kill().await;
    }

    /// Goes on, and says nothing any more, until the other signal.
    pub async fn signal(&self, signal: &str) {
        self.program().signal(signal).await;
    }

    /// From the next start on, the bridge is known by that token.
    pub fn rotate(&self, token: &str) {
        fs::write(self.folder.path().join("tokens.csv"), tokens(token)).unwrap();
    }

    /// File of the kubeconfig of an administrator, or of the user `bridge`: `user` is its entry there.
    pub fn kubeconfig(&self, name: &str, user: &Value) -> String {
        let path = self.folder.path().join(name);
        fs::write(&path, kubeconfig(&self.port, &self.authority, user).to_string()).unwrap();
        path.to_str().unwrap().to_owned()
    }

    pub fn admin(&self) -> String {
        self.kubeconfig("admin.yaml", &json!({"token": ADMIN}))
    }

    pub fn bridge(&self) -> String {
        self.kubeconfig("bridge.yaml", &json!({"token": "bridge-token"}))
    }

    /// Defines the resource of Dynamo's workers.
    pub async fn define(&self) {
        let (kind, plural) = METADATA;
        let schema = json!({"type": "object", "properties": {"spec": {"type": "object", "properties": {
            "data": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
        }}}});
        let definition = json!({
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": format!("{plural}.nvidia.com")},
            "spec": {
                "group": "nvidia.com",
                "scope": "Namespaced",
                "names": {"kind": kind, "listKind": format!("{kind}List"), "plural": plural, "singular": kind.to_lowercase()},
                "versions": [{"name": "v1alpha1", "served": true, "storage": true, "schema": {"openAPIV3Schema": schema}}],
            },
        });
        let definitions: Api<CustomResourceDefinition> = Api::all(self.client.clone());
        definitions.create(&PostParams::default(), &serde_json::from_value(definition).unwrap()).await.unwrap();
        let metadata = self.metadata();
        eventually("the resource is defined", || async {
            metadata.list(&kube::api::ListParams::default()).await.map_err(|error| error.to_string())
        })
        .await;
    }

    /// Lets the user `bridge` do that and nothing else: resource, its group, verbs.
    pub async fn allow(&self, rules: &[(&str, &str, &[&str])]) {
        let rules: Vec<_> = rules
            .iter()
            .map(|(resource, group, verbs)| json!({"apiGroups": [group], "resources": [resource], "verbs": verbs}))
            .collect();
        let metadata = json!({"name": "bridge"});
        let role =
            json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": metadata, "rules": rules});
        self.apply::<Role>("bridge", role).await;
        let binding = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": metadata,
            "subjects": [{"kind": "User", "name": "bridge", "apiGroup": "rbac.authorization.k8s.io"}],
            "roleRef": {"kind": "Role", "name": "bridge", "apiGroup": "rbac.authorization.k8s.io"},
        });
        self.apply::<RoleBinding>("bridge", binding).await;
    }

    /// A pod of a Dynamo worker; returns its uid. One that is there already is another's: it is replaced.
    pub async fn pod(&self, name: &str) -> String {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), NAMESPACE);
        pods.delete(name, &DeleteParams::default().grace_period(0)).await.ok();
        eventually("the pod is gone", || async {
            let found = pods.get_opt(name).await.map_err(|error| error.to_string())?;
            found.map_or(Ok(()), |pod| Err(format!("{pod:?}")))
        })
        .await;
        let pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": labels()},
            "spec": {"nodeName": "fake", "automountServiceAccountToken": false, "containers": [{"name": "main", "image": "none"}]},
        });
        let pod = pods.create(&PostParams::default(), &serde_json::from_value(pod).unwrap()).await.unwrap();
        pod.metadata.uid.unwrap()
    }

    /// As a kubelet says: by container, whether it is ready.
    pub async fn containers(&self, pod: &str, containers: &[(&str, bool)]) {
        let containers: Vec<_> = containers
            .iter()
            .map(|(name, ready)| json!({"name": name, "ready": ready, "image": "none", "imageID": "", "restartCount": 0}))
            .collect();
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), NAMESPACE);
        let status = json!({"status": {"containerStatuses": containers}});
        pods.patch_status(pod, &PatchParams::default(), &Patch::Merge(status)).await.unwrap();
    }

    /// The slice of a pod.
    pub async fn slice(&self, pod: &str, uid: &str, ready: bool) {
        self.slice_of(pod, &[(pod, uid, ready)]).await;
    }

    /// A slice of several pods: name, uid, readiness.
    pub async fn slice_of(&self, name: &str, pods: &[(&str, &str, bool)]) {
        let endpoints: Vec<_> = pods
            .iter()
            .map(|(pod, uid, ready)| {
                let target = json!({"kind": "Pod", "name": pod, "namespace": NAMESPACE, "uid": uid});
                json!({"addresses": ["10.244.0.9"], "conditions": {"ready": ready}, "targetRef": target})
            })
            .collect();
        let mut labels = labels();
        labels["kubernetes.io/service-name"] = "workers".into();
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": name, "labels": labels},
            "addressType": "IPv4",
            "ports": [{"name": "system", "port": 9090, "protocol": "TCP"}],
            "endpoints": endpoints,
        });
        self.apply::<EndpointSlice>(name, slice).await;
    }

    pub async fn delete_slice(&self, pod: &str) {
        let slices: Api<EndpointSlice> = Api::namespaced(self.client.clone(), NAMESPACE);
        slices.delete(pod, &DeleteParams::default()).await.unwrap();
    }

    /// What a worker applies; `data` is all that is in it.
    pub async fn register(&self, name: &str, (pod, uid): (&str, &str), data: Value) {
        let (kind, _) = METADATA;
        let object = json!({
            "apiVersion": "nvidia.com/v1alpha1",
            "kind": kind,
            "metadata": {"name": name, "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": pod, "uid": uid}]},
            "spec": {"data": data},
        });
        let parameters = PatchParams::apply("tests").force();
        self.metadata().patch(name, &parameters, &Patch::Apply(object)).await.unwrap();
    }

    pub async fn deregister(&self, name: &str) {
        self.metadata().delete(name, &DeleteParams::default()).await.unwrap();
    }

    fn metadata(&self) -> Api<DynamicObject> {
        let (kind, plural) = METADATA;
        let kind = GroupVersionKind::gvk("nvidia.com", "v1alpha1", kind);
        let resource = ApiResource::from_gvk_with_plural(&kind, plural);
        Api::namespaced_with(self.client.clone(), NAMESPACE, &resource)
    }

    async fn apply<K>(&self, name: &str, object: Value)
    where
        K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
            + Clone
            + std::fmt::Debug
            + Serialize
            + DeserializeOwned,
    {
        let api: Api<K> = Api::namespaced(self.client.clone(), NAMESPACE);
        api.patch(name, &PatchParams::apply("tests").force(), &Patch::Apply(object)).await.unwrap();
    }
}

fn tokens(bridge: &str) -> String {
    format!("{ADMIN},admin,admin,\"system:masters\"\n{bridge},bridge,bridge\n")
}

fn labels() -> Value {
    json!({"nvidia.com/dynamo-discovery-backend": "kubernetes", "nvidia.com/dynamo-discovery-enabled": "true"})
}

/// JSON is YAML.
fn kubeconfig(port: &Port, authority: &Authority, user: &Value) -> Value {
    let server = format!("https://{}", port.address());
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": {"server": server, "certificate-authority": authority.certificate()}}],
        "users": [{"name": "test", "user": user}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": NAMESPACE}}],
        "current-context": "test",
    })
}
