//! What whole real Dynamo clusters bill over their HTTP API, and what the bridge counted of their forward passes: the same,
//! to the token, by its own page and by a Collector that it pushes to.

#![expect(clippy::float_cmp, reason = "whole numbers")]

use futures_util::future::join_all;

use crate::support::{Bridge, Cluster, Collector, Exposition, Place, Via, cluster, eventually, peers};

/// Some prompts are longer than a chunk of prefill.
const CHUNKED: &[&str] = &["--max-num-batched-tokens", "1024"];
const REQUESTS: usize = 60;
/// Tokens of a prompt, which are its words.
const LENGTHS: [usize; 7] = [40, 96, 160, 300, 1500, 64, 700];
const BLOCK_SIZE: usize = 16;
const AT_A_TIME: usize = 10;
/// Whose passes are what is billed.
const BILLED: &str = "backend";

/// What is known of the cached part of a prompt.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Cached {
    /// Its `usage` names it (1.5 and later).
    Billed,
    /// It is what an earlier prompt began with: there is one worker, and no two prompts at a time begin alike.
    Prefix,
}

/// Tokens by the `usage` of answers.
#[derive(Debug, Default, PartialEq)]
struct Bill {
    /// Of prompts, less those that were cached.
    prefill: f64,
    /// Of answers, less the first of each.
    decode: f64,
}

impl Bill {
    /// `prefix` is how much of the prompt was cached, where `usage` does not say it. Engines of that time make even the first
    /// token by decoding, where the whole prompt is.
    fn add(&mut self, usage: &str, prefix: Option<usize>) {
        let usage: serde_json::Value = serde_json::from_str(usage).unwrap();
        let count = |pointer| usage.pointer(pointer).and_then(serde_json::Value::as_f64).unwrap_or_default();
        let prompt = count("/prompt_tokens");
        let cached = prefix.map_or_else(|| count("/prompt_tokens_details/cached_tokens"), whole);
        let first = if prefix.is_some() && cached == prompt { 0.0 } else { 1.0 };
        self.prefill += prompt - cached;
        self.decode += count("/completion_tokens") - first;
    }
}

fn whole(number: usize) -> f64 {
    f64::from(u32::try_from(number).unwrap())
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
    let heartbeats = whole(3 * ranks);
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
async fn bill(cluster: &Cluster, cached: Cached) -> Bill {
    let beginnings = if cached == Cached::Billed { AT_A_TIME / 2 } else { AT_A_TIME };
    // The longest prompt of each beginning so far. One was there before: see `Cluster::answers`.
    let mut longest = [0; AT_A_TIME];
    longest[0] = cluster::FIRST_PROMPT;
    let mut bill = Bill::default();
    for first in (0..REQUESTS).step_by(AT_A_TIME) {
        let chats = (first..first + AT_A_TIME).map(|request| {
            let words = LENGTHS[request % LENGTHS.len()];
            let beginning = request % beginnings;
            let prefix = words.min(longest[beginning]) / BLOCK_SIZE * BLOCK_SIZE;
            longest[beginning] = words.max(longest[beginning]);
            let chat = cluster.ask(&words.to_string(), &(4 + request % 17).to_string(), beginning * 100);
            async move { (chat.ended_well().await.unwrap(), prefix) }
        });
        for (usage, prefix) in join_all(chats).await {
            bill.add(&usage, (cached == Cached::Prefix).then_some(prefix));
        }
    }
    bill
}

/// Requests placed, by the sum over all workers, and blocks of their prompts.
fn placed(metrics: &Exposition) -> (f64, f64) {
    let sum = |name| metrics.values(name, &[]).iter().sum::<f64>();
    (sum("llm_requests_placed_total"), sum("llm_kv_hit_rate_isl_blocks"))
}

/// The sum of all requests' hit rates, by the router itself.
async fn hit_rates(cluster: &Cluster) -> f64 {
    cluster.frontend_metrics().await.values("dynamo_component_router_kv_hit_rate_sum", &[]).iter().sum()
}

/// What was seen one way, before and after; what is billed of it, and what the router says of its hit rates.
struct Seen<'a> {
    before: &'a Exposition,
    after: &'a Exposition,
    bill: &'a Bill,
    rates: f64,
}

impl Seen<'_> {
    fn adds_up(&self, components: &[(&str, usize)]) {
        let Self { after, .. } = self;
        let (before, total) = (counted(self.before, BILLED), counted(after, BILLED));
        let computed = Bill { prefill: total.prefill - before.prefill, decode: total.decode - before.decode };
        assert_eq!(computed, *self.bill, "{}", after.text);
        self.placements_add_up(components.len());
        for (component, _) in components {
            let sum = |name| sum(after, name, component);
            let (passes, timed) = (sum("llm_forward_passes_total"), sum("llm_forward_pass_wall_time_seconds_count"));
            assert_eq!([sum("llm_forward_passes_lost_total"), timed], [0.0, passes], "{}", after.text);
        }
        let used = after.values("llm_kv_blocks_active", &[("component", BILLED)]);
        assert!(used.iter().all(|used| *used == 0.0), "{used:?}");
        let slots = after.values("llm_requests_active_slots", &[("component", BILLED)]);
        assert!(!slots.is_empty() && slots.iter().all(|slots| *slots == 0.0), "the classics are there: {slots:?}");
    }

    /// Every request was placed once for each role, its prompt is counted once, and nothing is in flight any more. A router
    /// counts the rate of a disaggregated request twice, so that only the others can be compared.
    fn placements_add_up(&self, roles: usize) {
        let Self { before, after, rates, .. } = self;
        let ((placed_before, isl_before), (placed_after, isl_after)) = (placed(before), placed(after));
        let blocks = (0..REQUESTS).map(|request| LENGTHS[request % LENGTHS.len()].div_ceil(BLOCK_SIZE)).sum();
        let counted = [placed_after - placed_before, isl_after - isl_before];
        assert_eq!(counted, [whole(REQUESTS * roles), whole(blocks)], "{}", after.text);
        assert!(after.values("llm_requests_in_flight", &[]).iter().all(|requests| *requests == 0.0), "{}", after.text);
        let sum = |metrics: &Exposition| metrics.values("llm_kv_hit_rate_ratio_sum", &[]).iter().sum::<f64>();
        let ours = sum(after) - sum(before);
        assert!(ours > 1.0, "prompts have prefixes in common: {ours}");
        assert!(roles > 1 || (ours - rates).abs() < 1e-6, "{ours}, by the router {rates}");
    }
}

/// The engines at rest, by the bridge's page and, where there is one, by the Collector.
async fn looks(bridge: &Bridge, collector: Option<&Collector>, components: &[(&str, usize)]) -> Vec<Exposition> {
    let mut looks = vec![is_at_rest(bridge, components).await];
    if let Some(collector) = collector {
        looks.push(collector.agrees_with(bridge).await);
    }
    looks
}

/// What the workers of [`BILLED`] computed is what is billed, and nothing was missed, whoever is asked.
async fn adds_up(cluster: Cluster, cached: Cached, options: &[&[&str]], components: &[(&str, usize)]) {
    let collector = Collector::start(&[]).await;
    let url = collector.as_ref().map(|collector| collector.url(Via::Grpc));
    let push: Vec<_> = url.iter().flat_map(|url| ["--otlp-endpoint", url]).collect();
    let often = [("OTEL_METRIC_EXPORT_INTERVAL", "500"), ("OTEL_TRACES_EXPORTER", "none")];
    let bridge = cluster.bridge_with(&push, &often).await;
    let _workers: Vec<_> = options.iter().map(|options| cluster.workers(&[CHUNKED, options].concat())).collect();
    cluster.answers().await;
    let before = looks(&bridge, collector.as_ref(), components).await;
    let rates = hit_rates(&cluster).await;
    let bill = bill(&cluster, cached).await;
    let after = looks(&bridge, collector.as_ref(), components).await;
    let rates = hit_rates(&cluster).await - rates;
    for (before, after) in before.iter().zip(&after) {
        Seen { before, after, bill: &bill, rates }.adds_up(components);
    }
}

#[tokio::test]
async fn the_passes_of_a_real_cluster_add_up_to_its_bill() {
    if peers::can_run_cluster().await {
        adds_up(Cluster::start(Place::etcd().await), Cached::Billed, &[&[]], &[("backend", 2)]).await;
    }
}

#[tokio::test]
async fn the_passes_of_a_real_cluster_with_two_ranks_add_up_to_its_bill() {
    if peers::can_run_cluster().await {
        let cluster = Cluster::start(Place::etcd().await);
        adds_up(cluster, Cached::Billed, &[&["--data-parallel-size", "2"]], &[("backend", 4)]).await;
    }
}

#[tokio::test]
async fn the_decode_workers_passes_of_a_disaggregated_cluster_add_up_to_its_bill() {
    if peers::can_run_cluster().await {
        let roles: [&[&str]; 2] = [&["--disaggregation-mode", "prefill"], &["--disaggregation-mode", "decode"]];
        let cluster = Cluster::start(Place::etcd().await);
        adds_up(cluster, Cached::Billed, &roles, &[("prefill", 2), ("backend", 2)]).await;
    }
}

/// A release whose `usage` does not say what was cached.
async fn adds_up_to_its_prompts(release: &'static str, place: Place) {
    adds_up(Cluster::of(release, place), Cached::Prefix, &[&["--num-workers", "1"]], &[("backend", 1)]).await;
}

#[tokio::test]
async fn the_passes_of_a_real_cluster_of_1_3_add_up_to_its_prompts() {
    if peers::can_run_cluster_of("1.3.1").await {
        adds_up_to_its_prompts("1.3.1", Place::etcd().await).await;
    }
}

#[tokio::test]
async fn the_passes_of_a_real_cluster_of_1_1_on_nats_add_up_to_its_prompts() {
    if peers::can_run_cluster_of("1.1.1").await {
        adds_up_to_its_prompts("1.1.1", Place::etcd_and_nats().await).await;
    }
}

/// A LoRA adapter, with a card of its own and larger blocks; its prompts in blocks of the router that places them.
async fn an_adapter_is_counted(release: &'static str, size: usize) {
    const ADAPTER: &str = "ad/Apter";
    const PROMPTS: [usize; 2] = [160, 320];
    let cluster = Cluster::of(release, Place::etcd().await);
    let bridge = cluster.bridge().await;
    let _worker = cluster.workers(&["--num-workers", "1"]);
    cluster.answers().await;
    let before = is_at_rest(&bridge, &[(BILLED, 1)]).await;
    let rates = hit_rates(&cluster).await;
    cluster.add_adapter(ADAPTER, "ad_apter", 4 * BLOCK_SIZE).await;
    for words in PROMPTS {
        eventually("the adapter answers", || cluster.ask_model(ADAPTER, &words.to_string(), "4", 500).ended_well())
            .await;
    }
    let after = is_at_rest(&bridge, &[(BILLED, 1)]).await;
    let rates = hit_rates(&cluster).await - rates;
    let ((placed_before, isl_before), (placed_after, isl_after)) = (placed(&before), placed(&after));
    let blocks = PROMPTS.iter().map(|words| words.div_ceil(size)).sum();
    assert_eq!([placed_after - placed_before, isl_after - isl_before], [2.0, whole(blocks)], "{}", after.text);
    let sum = |metrics: &Exposition| metrics.values("llm_kv_hit_rate_ratio_sum", &[]).iter().sum::<f64>();
    let ours = sum(&after) - sum(&before);
    assert!((ours - rates).abs() < 1e-6, "{ours}, by the router {rates}");
}

#[tokio::test]
async fn an_adapter_of_a_real_cluster_of_1_3_is_counted_in_its_own_blocks() {
    if peers::can_run_cluster_of("1.3.1").await {
        an_adapter_is_counted("1.3.1", 4 * BLOCK_SIZE).await;
    }
}

#[tokio::test]
async fn an_adapter_of_todays_real_cluster_is_counted_in_the_models_blocks() {
    if peers::can_run_cluster().await {
        an_adapter_is_counted(cluster::RELEASE, BLOCK_SIZE).await;
    }
}
