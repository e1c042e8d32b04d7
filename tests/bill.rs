//! What whole real Dynamo clusters bill over their HTTP API, and what the bridge counted of their forward passes: the same,
//! to the token.

#![expect(clippy::float_cmp, reason = "whole numbers")]

use futures_util::future::join_all;

use crate::support::{Bridge, Cluster, Exposition, Place, peers};

/// Some prompts are longer than a chunk of prefill.
const CHUNKED: &[&str] = &["--max-num-batched-tokens", "1024"];
const REQUESTS: usize = 60;
/// Tokens of a prompt, which are its words.
const LENGTHS: [usize; 7] = [40, 96, 160, 300, 1500, 64, 700];
const BLOCK_SIZE: usize = 16;
const AT_A_TIME: usize = 10;

/// Tokens by the `usage` of answers.
#[derive(Debug, Default, PartialEq)]
struct Bill {
    /// Of prompts, less those that were cached.
    prefill: f64,
    /// Of answers, less the first of each.
    decode: f64,
}

impl Bill {
    fn add(&mut self, usage: &str) {
        let usage: serde_json::Value = serde_json::from_str(usage).unwrap();
        let count = |pointer| usage.pointer(pointer).and_then(serde_json::Value::as_f64).unwrap_or_default();
        self.prefill += count("/prompt_tokens") - count("/prompt_tokens_details/cached_tokens");
        self.decode += count("/completion_tokens") - 1.0;
    }
}

fn sum(metrics: &Exposition, name: &str, component: &str) -> f64 {
    metrics.values(name, &[("component", component)]).iter().sum()
}

fn counted(metrics: &Exposition, component: &str) -> Bill {
    Bill {
        prefill: sum(metrics, "llm_forward_pass_prefill_tokens_total", component),
        decode: sum(metrics, "llm_forward_pass_decode_tokens_total", component),
    }
}

/// Of so many ranks a heartbeat is what was heard last, and several messages came since: nothing is on its way any more.
async fn is_at_rest(bridge: &Bridge, components: &[(&str, usize)]) -> Exposition {
    const HEARD: (&str, &[(&str, &str)]) = ("dynamo_bridge_events_total", &[("topic", "forward-pass-metrics")]);
    let before = bridge.metrics().await.value(HEARD.0, HEARD.1).unwrap_or_default();
    let ranks: usize = components.iter().map(|(_, ranks)| ranks).sum();
    let heartbeats = f64::from(u32::try_from(3 * ranks).unwrap());
    bridge
        .eventually("the engines are at rest", |metrics| {
            let rest = components.iter().all(|(component, ranks)| {
                let scheduled = metrics.values("llm_forward_pass_scheduled_requests", &[("component", component)]);
                scheduled == vec![0.0; 2 * ranks]
            });
            let heard = metrics.value(HEARD.0, HEARD.1).unwrap_or_default();
            (rest && heard >= before + heartbeats).then(|| metrics.clone())
        })
        .await
}

/// Prompts of mixed length, many with a common prefix, ten at a time; what they are billed.
async fn bill(cluster: &Cluster) -> Bill {
    let mut bill = Bill::default();
    for first in (0..REQUESTS).step_by(AT_A_TIME) {
        let chats = (first..first + AT_A_TIME).map(|request| {
            let words = LENGTHS[request % LENGTHS.len()].to_string();
            cluster.ask(&words, &(4 + request % 17).to_string(), request % 5 * 100).ended_well()
        });
        for answer in join_all(chats).await {
            bill.add(&answer.unwrap());
        }
    }
    bill
}

/// Requests placed, by the sum over all workers, and blocks of their prompts.
fn placed(metrics: &Exposition) -> (f64, f64) {
    let sum = |name| metrics.values(name, &[]).iter().sum::<f64>();
    (sum("llm_requests_placed_total"), sum("llm_kv_hit_rate_isl_blocks"))
}

/// The sum of all requests' hit rates, by the bridge and by the router itself.
async fn hit_rates(metrics: &Exposition, cluster: &Cluster) -> (f64, f64) {
    let router = cluster.frontend_metrics().await;
    let sum = |metrics: &Exposition, name| metrics.values(name, &[]).iter().sum();
    (sum(metrics, "llm_kv_hit_rate_ratio_sum"), sum(&router, "dynamo_component_router_kv_hit_rate_sum"))
}

/// Every request was placed once for each role, its prompt is counted once, and nothing is in flight any more. A router
/// counts the rate of a disaggregated request twice, so that only the others can be compared.
async fn placements_add_up(
    cluster: &Cluster,
    before: &Exposition,
    rates_before: (f64, f64),
    after: &Exposition,
    roles: usize,
) {
    let ((placed_before, isl_before), (placed_after, isl_after)) = (placed(before), placed(after));
    let whole = |number: usize| f64::from(u32::try_from(number).unwrap());
    let blocks = (0..REQUESTS).map(|request| LENGTHS[request % LENGTHS.len()].div_ceil(BLOCK_SIZE)).sum();
    let counted = [placed_after - placed_before, isl_after - isl_before];
    assert_eq!(counted, [whole(REQUESTS * roles), whole(blocks)], "{}", after.text);
    assert!(after.values("llm_requests_in_flight", &[]).iter().all(|requests| *requests == 0.0), "{}", after.text);
    let rates = hit_rates(after, cluster).await;
    let (ours, theirs) = (rates.0 - rates_before.0, rates.1 - rates_before.1);
    assert!(ours > 1.0, "prompts have prefixes in common: {ours}");
    assert!(roles > 1 || (ours - theirs).abs() < 1e-6, "{ours}, by the router {theirs}");
}

/// What `component` computed is what is billed, and nothing was missed.
async fn adds_up(place: Place, options: &[&[&str]], components: &[(&str, usize)], component: &str) {
    let cluster = Cluster::start(place);
    let bridge = cluster.bridge().await;
    let _workers: Vec<_> = options.iter().map(|options| cluster.workers(&[CHUNKED, options].concat())).collect();
    cluster.answers().await;
    let start = is_at_rest(&bridge, components).await;
    let (before, rates) = (counted(&start, component), hit_rates(&start, &cluster).await);
    let bill = bill(&cluster).await;
    let metrics = is_at_rest(&bridge, components).await;
    let after = counted(&metrics, component);
    let computed = Bill { prefill: after.prefill - before.prefill, decode: after.decode - before.decode };
    assert_eq!(computed, bill, "{}", metrics.text);
    placements_add_up(&cluster, &start, rates, &metrics, components.len()).await;
    for (component, _) in components {
        let sum = |name| sum(&metrics, name, component);
        let (passes, timed) = (sum("llm_forward_passes_total"), sum("llm_forward_pass_wall_time_seconds_count"));
        assert_eq!([sum("llm_forward_passes_lost_total"), timed], [0.0, passes], "{}", metrics.text);
    }
    let used = metrics.values("llm_kv_blocks_active", &[("component", component)]);
    assert!(used.iter().all(|used| *used == 0.0), "{used:?}");
    let slots = metrics.values("llm_requests_active_slots", &[("component", component)]);
    assert!(!slots.is_empty() && slots.iter().all(|slots| *slots == 0.0), "the classics are there: {slots:?}");
}

#[tokio::test]
async fn the_passes_of_a_real_cluster_add_up_to_its_bill() {
    if peers::can_run_cluster().await {
        adds_up(Place::etcd().await, &[&[]], &[("backend", 2)], "backend").await;
    }
}

#[tokio::test]
async fn the_passes_of_a_real_cluster_with_two_ranks_add_up_to_its_bill() {
    if peers::can_run_cluster().await {
        adds_up(Place::etcd().await, &[&["--data-parallel-size", "2"]], &[("backend", 4)], "backend").await;
    }
}

#[tokio::test]
async fn the_decode_workers_passes_of_a_disaggregated_cluster_add_up_to_its_bill() {
    if peers::can_run_cluster().await {
        let roles: [&[&str]; 2] = [&["--disaggregation-mode", "prefill"], &["--disaggregation-mode", "decode"]];
        adds_up(Place::etcd().await, &roles, &[("prefill", 2), ("backend", 2)], "backend").await;
    }
}
