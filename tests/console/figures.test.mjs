// Run by test_console.py: node --test figures.test.mjs

import assert from "node:assert/strict";
import test from "node:test";

import {
  buckets, choices, count, events, life, parseMetrics, pools, quantile, rate, stores, time, total, whereabouts,
} from "../../pdserve/cluster/console/figures.js";

const TEXT = `# HELP a_total What
# TYPE a_total counter
a_total{kind="x \\"y\\" \\\\ z"} 3
a_total{kind="b"} 4.5e0
t_bucket{le="0.1"} 2
t_bucket{le="1.0"} 6
t_bucket{le="+Inf"} 8
plain 7
not a sample
`;

test("samples have names, labels and values", () => {
  const samples = parseMetrics(TEXT);
  assert.equal(samples.length, 6);
  assert.equal(samples[0].labels.kind, 'x "y" \\ z');
  assert.equal(total(samples, "a_total"), 7.5);
  assert.equal(total(samples, "nothing"), 0);
});

test("quantiles are of what came between two looks", () => {
  const after = buckets(parseMetrics(TEXT), "t");
  assert.deepEqual(after.map(([bound]) => bound), [0.1, 1, Infinity]);
  assert.equal(quantile(after, after, 0.5), null);
  const none = after.map(([bound]) => [bound, 0]);
  assert.ok(Math.abs(quantile(none, after, 0.25) - 0.1) < 1e-9);
  assert.ok(Math.abs(quantile(none, after, 0.5) - 0.55) < 1e-9);
  assert.equal(quantile(none, after, 0.99), 1);
  const before = [[0.1, 2], [1, 2], [Infinity, 2]];
  assert.ok(quantile(before, after, 0.1) > 0.1);
});

test("rates are never negative: a counter may begin anew", () => {
  assert.equal(rate(10, 30, 2), 10);
  assert.equal(rate(30, 10, 2), 0);
  assert.equal(rate(1, 2, 0), 0);
});

test("a life's parts add up to all of it", () => {
  const report = { queue_ms: 3, prefill_ms: 20, handoff_ms: 0, first_token_ms: 30, total_ms: 100 };
  const parts = life(report);
  assert.deepEqual(parts.map((part) => part.name), ["waiting", "prefill", "gateway and network", "decode"]);
  assert.equal(parts.reduce((sum, part) => sum + part.ms, 0), 100);
});

test("events may be cut anywhere", () => {
  const whole = 'data: {"a": 1}\n\n: note\n\ndata: {"b": 2}\r\n\r\ndata: [DONE]\n\n';
  for (let cut = 0; cut <= whole.length; cut += 1) {
    const first = events(whole.slice(0, cut));
    const second = events(first.rest + whole.slice(cut));
    assert.deepEqual([...first.data, ...second.data], ['{"a": 1}', '{"b": 2}', "[DONE]"]);
  }
});

test("figures are short", () => {
  assert.deepEqual([count(3), count(12345), count(2.5e6)], ["3", "12.3 k", "2.5 M"]);
  assert.deepEqual([time(3.21), time(999), time(1500), time(null)], ["3.2 ms", "999 ms", "1.50 s", "none"]);
});

test("what a worker may become depends on the mode and on what it is", () => {
  const roles = (duty, mode, more = {}) =>
    choices({ worker: "w", duty, pool: "decode", draining: false, ...more }, mode).map((each) => each.role);
  assert.deepEqual(roles("decode", "disaggregated"), ["prefill", "none"]);
  assert.deepEqual(roles("prefill", "disaggregated"), ["decode", "none"]);
  assert.deepEqual(roles("none", "disaggregated"), ["decode"]);
  assert.deepEqual(roles("both", "auto"), ["prefill", "decode", "none"]);
  assert.deepEqual(roles("decode", "auto"), ["prefill", "both", "none"]);
  assert.deepEqual(roles("none", "auto"), ["both"]);
  assert.deepEqual(roles("both", "aggregated"), ["none"]);
  assert.deepEqual(roles("none", "aggregated"), ["both"]);
  assert.deepEqual(roles("decode", "disaggregated", { draining: true }), [], "it leaves already");
});

test("a pool is shown before the autoscaler has decided anything", () => {
  const pool = { pool: "decode", least: 1, most: 4, wanted: null, start_s: 10 };
  const why = "two wait";
  const latest = [{ pool: "decode", workers: 1, wanted: 2, demand: 1.5, why }];
  assert.deepEqual(pools({ pools: [pool], latest: [] })[0].why, "it looks on before it decides");
  assert.deepEqual(pools({ pools: [pool], latest })[0],
    { pool: "decode", workers: 1, wanted: 2, bounds: "1 to 4", demand: "1.50", why });
  assert.equal(pools({ pools: [{ ...pool, least: 4 }], latest })[0].bounds, "4, fixed");
});

test("live requests are where the flow has them", () => {
  assert.deepEqual(whereabouts({ queued: 3, prefilling: 0, handing_off: 1 }), ["3 queued", "1 handing off"]);
});

test("a store's tiers are told apart from another's", () => {
  const samples = parseMetrics(`pdserve_kv_slots{state="free",store="a"} 5
pdserve_kv_slots{state="reserved",store="a"} 1
pdserve_kv_slots{state="private",store="a"} 1
pdserve_kv_slots{state="committed",store="a"} 3
pdserve_kv_slots{state="free",store="b"} 2
pdserve_kv_blocks_total{outcome="asked",store="a"} 9
pdserve_kv_blocks_total{outcome="found_memory",store="a"} 6
pdserve_kv_held{kind="tickets_queued",store="a"} 4
`);
  const [a, b] = stores(samples);
  assert.deepEqual(a, {
    store: "a", slots: 10, kept: 3, inHandoff: 2, asked: 9, fromMemory: 6, fromDisk: 0, handoffs: 0, waiting: 4,
  });
  assert.deepEqual([b.store, b.slots, b.asked], ["b", 2, 0]);
});
