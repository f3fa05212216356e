// Pure: what the gateway answers, made into what is shown. No page, no clock, no network.

/** Prometheus' text format as [{name, labels, value}]. Lines that are none are left out. */
export function parseMetrics(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const found = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!found) continue;
    const labels = {};
    for (const [, name, value] of (found[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[name] = value.replace(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c));
    }
    const value = found[3] === "+Inf" ? Infinity : Number(found[3]);
    if (!Number.isNaN(value)) samples.push({ name: found[1], labels, value });
  }
  return samples;
}

/** The sum of all samples of a name. */
export function total(samples, name) {
  return samples.filter((each) => each.name === name).reduce((sum, each) => sum + each.value, 0);
}

/** Counts of a histogram by upper bound, over all its labels, ascending. */
export function buckets(samples, name) {
  const counts = new Map();
  for (const each of samples) {
    if (each.name !== `${name}_bucket`) continue;
    const bound = each.labels.le === "+Inf" ? Infinity : Number(each.labels.le);
    counts.set(bound, (counts.get(bound) ?? 0) + each.value);
  }
  return [...counts].sort((a, b) => a[0] - b[0]);
}

/** The q-quantile of what was counted between two looks; null where nothing was. Linear within a
 * bucket; what lies above the last bound is said to be that bound. */
export function quantile(before, after, q) {
  const earlier = new Map(before);
  const counts = after.map(([bound, count]) => [bound, count - (earlier.get(bound) ?? 0)]);
  const all = counts.at(-1)?.[1] ?? 0;
  if (!(all > 0)) return null;
  let lowBound = 0;
  let lowCount = 0;
  for (const [bound, count] of counts) {
    if (count >= q * all) {
      if (bound === Infinity) return lowBound;
      const part = count > lowCount ? (q * all - lowCount) / (count - lowCount) : 1;
      return lowBound + part * (bound - lowBound);
    }
    lowBound = bound;
    lowCount = count;
  }
  return lowBound;
}

/** Per second, from two looks at a counter; 0 where it began anew in between. */
export function rate(before, after, seconds) {
  return seconds > 0 ? Math.max(0, after - before) / seconds : 0;
}

/** Where an answer's time went, as [{name, kind, ms}]; parts of no length are left out. */
export function life(timing) {
  const first = timing.first_token_ms;
  const known = timing.queue_ms + timing.prefill_ms + timing.handoff_ms;
  const parts = [
    { name: "waiting", kind: "queue", ms: timing.queue_ms },
    { name: "prefill", kind: "prefill", ms: timing.prefill_ms },
    { name: "hand-off", kind: "store", ms: timing.handoff_ms },
    { name: "gateway and network", kind: "other", ms: Math.max(0, first - known) },
    { name: "decode", kind: "decode", ms: Math.max(0, timing.total_ms - Math.max(first, known)) },
  ];
  return parts.filter((part) => part.ms > 0);
}

/** Events of a stream: the data of each, and what is left of an unfinished one. */
export function events(text) {
  const parts = text.split(/\r?\n\r?\n/);
  const rest = parts.pop();
  const data = parts.map((part) =>
    part.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n"));
  return { data: data.filter(Boolean), rest };
}

export function count(value) {
  if (value >= 1e6) return `${(value / 1e6).toFixed(1)} M`;
  return value >= 1e4 ? `${(value / 1e3).toFixed(1)} k` : `${Math.round(value * 10) / 10}`;
}

export function time(ms) {
  if (ms === null || ms === undefined) return "none";
  return ms >= 1000 ? `${(ms / 1000).toFixed(2)} s` : `${ms.toFixed(ms < 10 ? 1 : 0)} ms`;
}

/** What an operator may make of a worker, as [{role, label, question}]; the router has the last say. */
export function choices(worker, mode) {
  const name = worker.worker;
  const to = (role) => ({
    role,
    label: `${role} only`,
    question: `${name} will ${role} from now on. What it has of its former work moves to other workers; no request is cancelled.`,
  });
  const drain = {
    role: "none",
    label: "drain",
    question: `${name} will get no more work, and what it has moves to other workers; no request is cancelled. It stays until it is stopped or put back to work.`,
  };
  const home = mode === "disaggregated" ? worker.pool : "both";
  const back = { role: home, label: "back to work", question: `${name} will ${home === "both" ? "prefill and decode" : home} again.` };
  if (worker.draining) return [];
  if (worker.duty === "none") return [back];
  if (mode === "aggregated") return [drain];
  const others = ["prefill", "decode"].filter((role) => role !== worker.duty).map(to);
  if (mode === "auto" && worker.duty !== "both") others.push({ ...back, label: "both" });
  return [...others, drain];
}

/** The autoscaler's pools, each with its latest decision: [{pool, workers, wanted, bounds, demand, why}]. */
export function pools(said) {
  return said.pools.map((pool) => {
    const now = said.latest.find((each) => each.pool === pool.pool);
    return {
      pool: pool.pool,
      workers: now?.workers ?? "",
      wanted: now?.wanted ?? "",
      bounds: pool.least === pool.most ? `${pool.most}, fixed` : `${pool.least} to ${pool.most}`,
      demand: now ? now.demand.toFixed(2) : "",
      why: now?.why ?? "it looks on before it decides",
    };
  });
}

/** Where live requests are, in the order of the flow; phases that nobody is in are left out. */
export function whereabouts(phases) {
  return Object.entries(phases).filter(([, number]) => number > 0)
    .map(([phase, number]) => `${number} ${phase.replaceAll("_", " ")}`);
}

/** The KV stores' tiers and hand-offs, by store. */
export function stores(samples) {
  const by = (name, label) => {
    const found = new Map();
    for (const each of samples) {
      if (each.name === name) found.set(`${each.labels.store} ${each.labels[label]}`, each.value);
    }
    return (store, value) => found.get(`${store} ${value}`) ?? 0;
  };
  const slots = by("pdserve_kv_slots", "state");
  const blocks = by("pdserve_kv_blocks_total", "outcome");
  const held = by("pdserve_kv_held", "kind");
  const names = new Set(samples.filter((each) => each.name === "pdserve_kv_slots").map((each) => each.labels.store));
  return [...names].map((store) => ({
    store,
    slots: ["free", "reserved", "committed", "private", "quarantined"].reduce((sum, state) => sum + slots(store, state), 0),
    kept: slots(store, "committed"),
    inHandoff: slots(store, "reserved") + slots(store, "private"),
    asked: blocks(store, "asked"),
    fromMemory: blocks(store, "found_memory"),
    fromDisk: blocks(store, "found_disk"),
    handoffs: held(store, "tickets"),
    waiting: held(store, "tickets_queued"),
  }));
}
