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
