//! The manifests of `otel-config/kubernetes`, applied to a real API server with the Role in force.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Command;

use crate::support::{Bridge, Kube, NAMESPACE, Program, command, dynamo, peers, worker};

/// A copy of the manifests.
fn manifests() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("kubernetes");
    copy_into(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/otel-config/kubernetes")), &copy);
    (folder, copy)
}

fn copy_into(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_into(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

async fn kubectl(kubeconfig: &str, arguments: &[&str]) -> String {
    let mut kubectl = Command::new("kubectl");
    kubectl.args(arguments).env("KUBECONFIG", kubeconfig).kill_on_drop(true);
    let output = kubectl.output().await.unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// With the manifests applied, the kubeconfig of the account that they make.
async fn applied(kube: &Kube, manifests: &Path) -> String {
    let admin = kube.admin();
    kubectl(&admin, &["apply", "-k", manifests.to_str().unwrap()]).await;
    let token = kubectl(&admin, &["create", "token", "dynamo-metrics"]).await;
    kube.kubeconfig("account.yaml", &json!({"token": token.trim()}))
}

#[tokio::test]
async fn a_bridge_with_the_manifests_account_and_arguments_finds_real_workers() {
    let Some(kube) = Kube::with_kubectl().await else { return };
    let (_folder, manifests) = manifests();
    let account = applied(&kube, &manifests).await;
    let path = "jsonpath={.spec.template.spec.containers[0].args}";
    let arguments = kubectl(&kube.admin(), &["get", "deployment", "dynamo-metrics", "-o", path]).await;
    let arguments: Vec<String> = serde_json::from_str(&arguments).unwrap();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let bridge = Bridge::finding(&arguments, &[("KUBECONFIG", &account)]).await;
    bridge.shows("dynamo_bridge_source_connected", &[("source", "kubernetes")], 1.0).await;

    if !peers::can_run_dynamo(&["1.6.1"]).await {
        return;
    }
    let uid = kube.pod("w0").await;
    let load = ["--kv-active", "40", "--kv-total", "400", "--namespace", "dynamo", "--flip", "--model", "tiny/model"];
    let real = dynamo::in_pod("1.6.1", &kube, ("w0", &uid), &load).await;
    kube.slice("w0", &uid, true).await;
    bridge.shows("llm_kv_blocks_total", &worker(&real.id), 400.0).await;
    bridge.shows("llm_workers", &[("dynamo_namespace", "dynamo"), ("state", "reporting")], 1.0).await;
}

#[tokio::test]
async fn a_manifest_with_one_verb_less_ends_the_start_with_that_verb() {
    let Some(kube) = Kube::with_kubectl().await else { return };
    let (_folder, manifests) = manifests();
    let role = manifests.join("role.yaml");
    let whole = fs::read_to_string(&role).unwrap();
    let (container, pod) = ("--kube-discovery-mode=container", "--kube-discovery-mode=pod");
    for (resource, mode, full_name) in [
        ("dynamoworkermetadatas", pod, "dynamoworkermetadatas.nvidia.com"),
        ("endpointslices", pod, "endpointslices.discovery.k8s.io"),
        ("pods", container, "pods"),
    ] {
        for (missing, left) in [("list", "watch"), ("watch", "list")] {
            let granted = format!("resources: [{resource}]\n    verbs: [");
            assert!(whole.contains(&format!("{granted}list, watch]")), "{whole}");
            let less = whole.replace(&format!("{granted}list, watch]"), &format!("{granted}{left}]"));
            fs::write(&role, less).unwrap();
            let account = applied(&kube, &manifests).await;
            let options = ["--discovery", "kubernetes", mode, "--host", "127.0.0.1", "--port", "0"];
            let environment = [("KUBECONFIG", account.as_str())];
            let mut program = Program::start(&mut command(env!("CARGO_BIN_EXE_metrics"), &options, &environment));
            assert_eq!(program.ended().await.code(), Some(1));
            let written = program.lines().join("\n");
            let expected = format!("let the bridge {missing} {full_name} in namespace {NAMESPACE}");
            assert!(written.contains(&expected), "{expected}: {written}");
        }
    }
}

/// As the API server took it.
async fn object(kubeconfig: &str, kind: &str) -> Value {
    let object = kubectl(kubeconfig, &["get", kind, "dynamo-metrics", "-o", "json"]).await;
    serde_json::from_str(&object).unwrap()
}

#[tokio::test]
async fn the_manifests_are_one_bridge_with_no_more_rights_and_no_more_open_than_it_needs() {
    let Some(kube) = Kube::with_kubectl().await else { return };
    let (_folder, manifests) = manifests();
    applied(&kube, &manifests).await;
    let admin = kube.admin();

    let deployment = object(&admin, "deployment").await["spec"].clone();
    assert_eq!((&deployment["replicas"], &deployment["strategy"]["type"]), (&json!(1), &json!("Recreate")));
    let container = &deployment["template"]["spec"]["containers"][0];
    let probes = [("startupProbe", "/livez"), ("livenessProbe", "/livez"), ("readinessProbe", "/readyz")];
    for (probe, path) in probes {
        assert_eq!(container[probe]["httpGet"], json!({"path": path, "port": "metrics", "scheme": "HTTP"}), "{probe}");
    }
    let [runs_as_root, writes] = ["runAsNonRoot", "readOnlyRootFilesystem"].map(|what| {
        let of_pod = &deployment["template"]["spec"]["securityContext"][what];
        if of_pod.is_null() { &container["securityContext"][what] } else { of_pod }
    });
    assert_eq!((runs_as_root, writes), (&json!(true), &json!(true)), "neither root nor a file that it could write");

    let right = |group: &str, resource: &str| json!({"apiGroups": [group], "resources": [resource], "verbs": ["list", "watch"]});
    let rights =
        [right("nvidia.com", "dynamoworkermetadatas"), right("discovery.k8s.io", "endpointslices"), right("", "pods")];
    assert_eq!(object(&admin, "role").await["rules"], json!(rights));
    let rendered = kubectl(&admin, &["kustomize", manifests.to_str().unwrap()]).await;
    assert_eq!(rendered.matches("kind: Role\n").count(), 2, "the Role, and the binding to it");
    assert!(!rendered.contains("ClusterRole"), "{rendered}");

    let policy = object(&admin, "networkpolicy").await["spec"].clone();
    assert_eq!(policy["ingress"], json!([{"ports": [{"port": "metrics", "protocol": "TCP"}]}]));
    assert_eq!(policy["policyTypes"], json!(["Ingress"]), "out of it anywhere");
    let service = object(&admin, "service").await["spec"].clone();
    assert_eq!((&service["ports"][0]["port"], &service["publishNotReadyAddresses"]), (&json!(9091), &json!(true)));
}

#[tokio::test]
async fn the_service_monitor_is_a_component_that_keeps_the_bridges_labels() {
    let Some(_) = peers::kubectl() else { return };
    let (folder, _) = manifests();
    let overlay = folder.path().join("overlay");
    fs::create_dir(&overlay).unwrap();
    let render = async |components: &str| {
        let text = format!("resources: [../kubernetes]\ncomponents: [{components}]\n");
        fs::write(overlay.join("kustomization.yaml"), text).unwrap();
        kubectl("", &["kustomize", overlay.to_str().unwrap()]).await
    };
    assert!(!render("").await.contains("monitoring.coreos.com"), "a cluster without the Operator takes the rest");
    let with = render("../kubernetes/service-monitor").await;
    assert!(with.contains("kind: ServiceMonitor") && with.contains("honorLabels: true"), "{with}");
}
