//! Whole real Dynamo clusters beside the bridge: a frontend, its KV router, and workers around a simulated engine.

use futures_util::future::join_all;

use crate::support::{Bridge, Chat, Cluster, Exposition, Place, Program, eventually, peers};

/// What the workers are started with.
const BLOCKS: f64 = 2000.0;
const SLOTS: f64 = 32.0;
const LIMITED: &[&str] = &["--max-num-seqs", "32"];

const SIGTERM: &str = "-TERM";
/// What it leaves lives on: files for `--file-ttl`, 20 s, and keys for their lease, 30 s in this release.
const SIGKILL: &str = "-KILL";

/// Whether so many workers are said to be there, whatever they said themselves.
fn has_workers(metrics: &Exposition, component: &str, count: usize) -> bool {
    let of = |state| [("component", component), ("endpoint", "generate"), ("state", state)];
    let there = ["reporting", "silent"].map(|state| metrics.value("llm_workers", &of(state)).unwrap_or_default());
    there.iter().sum::<f64>().to_string() == count.to_string()
}

/// Exactly so many workers are shown of each component, with exact limits for each of their ranks, and nobody else:
/// no helper, no router, no frontend.
fn is_exact(metrics: &Exposition, components: &[(&str, usize)], ranks: &[Option<&str>]) -> Result<(), String> {
    let mut expected_ids = 0;
    for &(component, count) in components {
        expected_ids += count;
        let labels = [("component", component), ("endpoint", "generate")];
        if !has_workers(metrics, component, count) || metrics.values("llm_worker_info", &labels).len() != count {
            return Err(format!("there are no {count} workers of {component}"));
        }
        for rank in ranks {
            let labels = [&labels[..], &rank.map(|rank| ("dp_rank", rank)).into_iter().collect::<Vec<_>>()].concat();
            for (name, limit) in [("llm_kv_blocks_total", BLOCKS), ("llm_requests_total_slots", SLOTS)] {
                if metrics.values(name, &labels) != vec![limit; count] {
                    return Err(format!("{name}{labels:?} is not {limit} of {count} workers"));
                }
            }
        }
        let all = metrics.values("llm_kv_blocks_total", &labels).len();
        if all != count * ranks.len() {
            return Err(format!("{component} has {all} ranks"));
        }
    }
    let mut names: Vec<_> = components.iter().map(|(component, _)| (*component).to_owned()).collect();
    names.sort();
    if ranks == [None] && !metrics.values("llm_kv_blocks_total", &[("dp_rank", "0")]).is_empty() {
        return Err("the only rank is labelled".to_owned());
    }
    let shown = (metrics.label_values("component"), metrics.label_values("endpoint"));
    if shown != (names, vec!["generate".to_owned()]) || metrics.values("llm_worker_info", &[]).len() != expected_ids {
        return Err(format!("somebody else is shown: {shown:?}"));
    }
    Ok(())
}

async fn becomes_exact(bridge: &Bridge, components: &[(&str, usize)], ranks: &[Option<&str>]) -> Exposition {
    let what = format!("exactly {components:?} with ranks {ranks:?}");
    bridge.eventually(&what, |metrics| is_exact(metrics, components, ranks).is_ok().then(|| metrics.clone())).await
}

/// Prompts of 160 words, no two with a common prefix, and long answers.
fn ask_all(cluster: &Cluster) -> Vec<Chat> {
    (1..=6).map(|request| cluster.ask("160", "1000", request * 160)).collect()
}

/// Blocks in use of every rank of a component that has said so.
fn used(metrics: &Exposition, component: &str) -> Vec<f64> {
    metrics.values("llm_kv_blocks_active", &[("component", component)])
}

/// Used blocks rise above nothing while requests run, and are back at nothing when they are answered.
async fn follows_requests(bridge: &Bridge, cluster: &Cluster) {
    cluster.answers().await;
    let chats = ask_all(cluster);
    let peak = bridge
        .eventually("blocks are used", |metrics| {
            let most = used(metrics, "backend").into_iter().fold(0.0, f64::max);
            // A prompt has ten.
            (most >= 10.0).then_some(most)
        })
        .await;
    assert!(peak < BLOCKS, "{peak}");
    for chat in chats {
        chat.ended_well().await.unwrap();
    }
    is_idle(bridge, "backend").await;
}

async fn is_idle(bridge: &Bridge, component: &str) {
    bridge
        .eventually(&format!("{component} is idle"), |metrics| {
            let used = used(metrics, component);
            (!used.is_empty() && used.iter().all(|used| *used == 0.0)).then_some(())
        })
        .await;
}

/// After a signal to their process no series of its workers is left, and their number is told.
async fn ends(bridge: &Bridge, mut mocker: Program, signal: &str, component: &str) {
    mocker.signal(signal).await;
    mocker.ended().await;
    is_gone(bridge, component).await;
}

async fn is_gone(bridge: &Bridge, component: &str) {
    let labels = [("component", component)];
    let metrics = bridge.loses("llm_worker_info", &labels).await;
    for gone in ["llm_kv_blocks_total", "llm_kv_blocks_active", "llm_requests_total_slots", "llm_kv_cache_usage_ratio"]
    {
        assert!(metrics.values(gone, &labels).is_empty(), "{gone}");
    }
    assert_eq!(metrics.values("llm_workers", &labels), [0.0; 4], "each state is shown with its zero");
}

/// Workers that are told to end while they compute: registered in etcd they leave their cards until they are done, and keep
/// their series.
async fn drain(bridge: &Bridge, cluster: &Cluster, mut mocker: Program) {
    cluster.answers().await;
    let chats = ask_all(cluster);
    bridge.eventually("both are busy", |metrics| (at_work(metrics) == 2).then_some(())).await;
    mocker.signal(SIGTERM).await;
    let metrics = bridge.shows("llm_workers", &[("component", "backend"), ("state", "draining")], 2.0).await;
    assert_eq!(at_work(&metrics), 2, "{}", metrics.text);
    assert_eq!(metrics.values("llm_kv_blocks_total", &[]), [BLOCKS; 2]);
    // One that came too late is refused.
    let answered: Vec<_> = join_all(chats.into_iter().map(Chat::ended_well)).await;
    assert!(answered.iter().any(Result::is_ok), "{answered:?}");
    mocker.ended().await;
    is_gone(bridge, "backend").await;
}

/// How many workers have blocks in use.
fn at_work(metrics: &Exposition) -> usize {
    used(metrics, "backend").into_iter().filter(|used| *used > 0.0).count()
}

/// From the first worker to the last one's death.
async fn a_cluster_is_followed(place: Place) {
    let cluster = Cluster::start(place);
    let bridge = cluster.bridge().await;
    let mocker = cluster.workers(LIMITED);
    let two = [("backend", 2)];
    becomes_exact(&bridge, &two, &[None]).await;
    follows_requests(&bridge, &cluster).await;
    // The router has registered all that it does by now, and placed requests.
    let metrics = bridge.metrics().await;
    is_exact(&metrics, &two, &[None]).unwrap_or_else(|error| panic!("{error}\n{}", metrics.text));
    assert_eq!(metrics.label_values("role"), ["aggregated"]);
    assert_eq!(metrics.label_values("model"), ["m"]);
    assert_eq!(metrics.label_values("block_size"), ["16"]);
    ends(&bridge, mocker, SIGTERM, "backend").await;
    if cluster.registers_in_etcd() {
        let mocker = cluster.workers(LIMITED);
        becomes_exact(&bridge, &two, &[None]).await;
        drain(&bridge, &cluster, mocker).await;
    }
    let mocker = cluster.workers(LIMITED);
    becomes_exact(&bridge, &two, &[None]).await;
    // A living frontend would sweep up after the workers.
    let _place = cluster.kill_frontend().await;
    ends(&bridge, mocker, SIGKILL, "backend").await;
}

async fn ranks_are_told_apart(place: Place) {
    let cluster = Cluster::start(place);
    let bridge = cluster.bridge().await;
    let mocker = cluster.workers(&[LIMITED, &["--data-parallel-size", "2"]].concat());
    let (two, ranks) = ([("backend", 2)], [Some("0"), Some("1")]);
    becomes_exact(&bridge, &two, &ranks).await;
    follows_requests(&bridge, &cluster).await;
    let metrics = bridge.metrics().await;
    is_exact(&metrics, &two, &ranks).unwrap_or_else(|error| panic!("{error}\n{}", metrics.text));
    assert_eq!(metrics.label_values("ranks"), ["2"]);
    ends(&bridge, mocker, SIGTERM, "backend").await;
}

async fn roles_are_told_apart(place: Place) {
    let cluster = Cluster::start(place);
    let bridge = cluster.bridge().await;
    let of_role = |role| cluster.workers(&[LIMITED, &["--disaggregation-mode", role]].concat());
    let (prefill, decode) = (of_role("prefill"), of_role("decode"));
    let all = [("prefill", 2), ("backend", 2)];
    becomes_exact(&bridge, &all, &[None]).await;
    follows_requests(&bridge, &cluster).await;
    // A simulated prefill is done with its blocks in the pass that it reports: each look finds it idle, and known.
    is_idle(&bridge, "prefill").await;
    let metrics = bridge.metrics().await;
    is_exact(&metrics, &all, &[None]).unwrap_or_else(|error| panic!("{error}\n{}", metrics.text));
    for (component, role) in [("prefill", "prefill"), ("backend", "decode")] {
        let labels = [("component", component), ("role", role)];
        assert_eq!(metrics.values("llm_worker_info", &labels), [1.0; 2], "{}", metrics.text);
    }
    ends(&bridge, prefill, SIGTERM, "prefill").await;
    let metrics = bridge.metrics().await;
    assert!(has_workers(&metrics, "backend", 2), "the others are untouched\n{}", metrics.text);
    assert_eq!(metrics.values("llm_kv_blocks_total", &[]), [BLOCKS; 2]);
    ends(&bridge, decode, SIGKILL, "backend").await;
}

#[tokio::test]
async fn a_real_cluster_is_followed_through_etcd() {
    if peers::can_run_cluster().await {
        a_cluster_is_followed(Place::etcd().await).await;
    }
}

#[tokio::test]
async fn a_real_cluster_is_followed_through_files() {
    if peers::can_run_cluster().await {
        a_cluster_is_followed(Place::folder()).await;
    }
}

#[tokio::test]
async fn ranks_of_a_real_cluster_are_told_apart_in_etcd_and_in_files() {
    if peers::can_run_cluster().await {
        ranks_are_told_apart(Place::etcd().await).await;
        ranks_are_told_apart(Place::folder()).await;
    }
}

#[tokio::test]
async fn roles_of_a_real_cluster_are_told_apart_in_etcd_and_in_files() {
    if peers::can_run_cluster().await {
        roles_are_told_apart(Place::etcd().await).await;
        roles_are_told_apart(Place::folder()).await;
    }
}

/// Two of them with a model card, and one whose blocks are not the workers': it has 128 tokens in one unless it is told.
#[tokio::test]
async fn real_routers_apart_are_no_workers_and_have_no_hit_rates_by_blocks_of_another_size() {
    if !peers::can_run_cluster().await {
        return;
    }
    let cluster = Cluster::start(Place::etcd().await);
    let mut bridge = cluster.bridge().await;
    let _mocker = cluster.workers(LIMITED);
    let two = [("backend", 2)];
    becomes_exact(&bridge, &two, &[None]).await;
    let mut router = cluster.run("router", &[]);
    let _others = ["global_router", "thunderagent_router"].map(|program| cluster.run(program, &[]));
    eventually("the routers are registered", || async {
        let cards = cluster.etcd().control(&["get", "--prefix", "v1/mdc/", "--keys-only"]).await;
        let both = ["/global_router/generate/", "/thunderagent_router/generate/"].map(|router| cards.contains(router));
        if both == [true; 2] { Ok(()) } else { Err(cards) }
    })
    .await;
    let metrics = routed(&bridge, &cluster, "3").await;
    is_exact(&metrics, &two, &[None]).unwrap_or_else(|error| panic!("{error}\n{}", metrics.text));
    let rejected = [("topic", "active_sequences_events"), ("reason", "other_block_size")];
    let rejected = metrics.values("dynamo_bridge_messages_rejected_total", &rejected).iter().sum::<f64>();
    assert_eq!(rejected.to_string(), placed(&metrics).to_string(), "{}", metrics.text);
    for rate in ["llm_kv_hit_rate_isl_blocks", "llm_kv_hit_rate_overlap_blocks", "llm_kv_hit_rate_ratio_count"] {
        assert!(metrics.values(rate, &[]).is_empty(), "{rate}\n{}", metrics.text);
    }
    bridge.program.says("give it --router-block-size 16").await;
    router.signal(SIGKILL).await;
    router.ended().await;
    // It would stay for its lease.
    cluster.etcd().control(&["del", "--prefix", "v1/instances/dynamo/router/"]).await;
    let _router = cluster.run("router", &["--router-block-size", "16"]);
    routed(&bridge, &cluster, "500").await;
    bridge
        .eventually("it is told, and has rates", |metrics| {
            let blocks = metrics.values("llm_kv_hit_rate_isl_blocks", &[]).iter().sum::<f64>();
            (blocks.to_string() == "37").then_some(())
        })
        .await;
}

fn placed(metrics: &Exposition) -> f64 {
    metrics.values("llm_requests_placed_total", &[]).iter().sum()
}

/// Prompts of 10, 20 and 7 blocks by the router apart, from that token on. A short one shows before that it is heard.
async fn routed(bridge: &Bridge, cluster: &Cluster, first: &str) -> Exposition {
    let before = placed(&bridge.metrics().await);
    eventually("the router is heard", || async {
        route(cluster, &[first, "1"]).await?;
        let now = placed(&bridge.metrics().await);
        if now > before { Ok(()) } else { Err(format!("{now} placed")) }
    })
    .await;
    let all = placed(&bridge.metrics().await) + 3.0;
    route(cluster, &[first, "160", "320", "100"]).await.unwrap();
    bridge.eventually("three more were placed", |metrics| (placed(metrics) >= all).then(|| metrics.clone())).await
}

async fn route(cluster: &Cluster, prompts: &[&str]) -> Result<(), String> {
    let mut requests = cluster.run("route", prompts);
    let status = requests.ended().await;
    if status.success() { Ok(()) } else { Err(requests.lines().join("\n")) }
}

/// What the only router believes in use on each worker that it has placed something on.
fn believed(metrics: &Exposition) -> Vec<f64> {
    metrics.values("llm_router_estimated_decode_blocks", &[("component", "backend")])
}

/// What the router of a release before 1.5 believes of the workers stands beside what they say themselves, and follows the
/// requests likewise.
async fn a_routers_estimates_are_shown(release: &'static str, place: Place) {
    let cluster = Cluster::of(release, place);
    let bridge = cluster.bridge_with(&["--router-estimates"], &[]).await;
    let _mocker = cluster.workers(&[]);
    cluster.answers().await;
    let chats = ask_all(&cluster);
    let metrics = bridge
        .eventually("a router believes blocks in use", |metrics| {
            // A prompt has ten.
            believed(metrics).iter().any(|blocks| *blocks >= 10.0).then(|| metrics.clone())
        })
        .await;
    assert_eq!(metrics.label_values("publisher_id").len(), 1, "{}", metrics.text);
    let tokens = metrics.values("llm_router_estimated_prefill_tokens", &[("component", "backend")]);
    assert_eq!(tokens.len(), believed(&metrics).len(), "{}", metrics.text);
    for chat in chats {
        chat.ended_well().await.unwrap();
    }
    bridge
        .eventually("it believes none in use", |metrics| {
            let believed = believed(metrics);
            (!believed.is_empty() && believed.iter().all(|blocks| *blocks == 0.0)).then_some(())
        })
        .await;
    is_idle(&bridge, "backend").await;
}

#[tokio::test]
async fn the_estimates_of_a_real_router_are_shown_from_nats() {
    if peers::can_run_cluster_of("1.1.1").await {
        a_routers_estimates_are_shown("1.1.1", Place::etcd_and_nats().await).await;
    }
}

#[tokio::test]
async fn the_estimates_of_a_real_router_are_shown_from_zmq() {
    if peers::can_run_cluster_of("1.3.1").await {
        a_routers_estimates_are_shown("1.3.1", Place::etcd().await).await;
    }
}
