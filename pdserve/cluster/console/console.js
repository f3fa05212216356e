// Looks at the cluster every second and shows it. All text that comes from outside is set as text.

import { buckets, count, events, life, parseMetrics, quantile, rate, time, total } from "./figures.js";

const EVERY_MS = 1000;
const SAMPLES_MAX = 180;
const GIVE_UP_MS = 5000;
const $ = (id) => document.getElementById(id);
const base = new URL("..", import.meta.url);
const KEY = "pdserve-key";

function make(tag, properties = {}, ...children) {
  const { className, style, ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  if (className) element.className = className;
  for (const [name, value] of Object.entries(style ?? {})) element.style[name] = value;
  element.append(...children);
  return element;
}

function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  return fetch(new URL(path, base), { ...options, headers });
}

async function look(path) {
  const answer = await ask(path, { signal: AbortSignal.timeout(GIVE_UP_MS) });
  if (answer.status === 401 || answer.status === 403) {
    $("access").hidden = false;
    throw new Error("an API key for administration is needed");
  }
  if (!answer.ok) throw new Error(`${path} answers ${answer.status}`);
  return answer;
}

// ── the flow ─────────────────────────────────────────────────────────────────────────────────────

function bar(label, value, most, kind, said = count(value)) {
  const width = `${most > 0 ? Math.min(100, (100 * value) / most) : 0}%`;
  return make("div", { className: "row" },
    make("span", {}, label),
    make("span", { className: "bar" }, make("i", { className: `of-${kind}`, style: { width } })),
    make("b", {}, said));
}

function showQueue(status) {
  const lengths = status.queue_lengths;
  const waiting = lengths.reduce((sum, each) => sum + each, 0);
  const most = Math.max(1, ...lengths);
  $("queue").replaceChildren(
    make("div", { className: "figure" }, count(waiting)),
    make("p", { className: "quiet" },
      `oldest ${time(status.oldest_wait_ms)}, work ${time(status.queued_work_ms)}, parked ${status.parked}`),
    ...lengths.map((length, level) => bar(`level ${level}`, length, most, "queue")));
}

function showPool(status, role) {
  const workers = status.workers.filter((each) => each.role === role);
  const cards = workers.map((each) => {
    const used = each.block_count - each.free_blocks;
    const state = each.draining ? "draining" : `${each.running} run, ${each.waiting} wait`;
    return make("div", { className: "worker" },
      make("p", {}, make("span", {}, each.worker), make("span", {}, state)),
      bar("running", each.running, each.running_max, role),
      bar("blocks", used, each.block_count, role, `${Math.round((100 * used) / each.block_count)} %`));
  });
  $(role).replaceChildren(...(cards.length ? cards : [make("p", { className: "quiet" }, "no worker of this kind")]));
}

function showStores(samples) {
  const slots = samples.filter((each) => each.name === "pdserve_kv_slots");
  const names = [...new Set(slots.map((each) => each.labels.store))];
  const cards = names.map((name) => {
    const of = (state) => slots.find((each) => each.labels.store === name && each.labels.state === state)?.value ?? 0;
    const all = ["free", "reserved", "committed", "private", "quarantined"].reduce((sum, state) => sum + of(state), 0);
    const found = (outcome) => samples.find((each) =>
      each.name === "pdserve_kv_blocks" && each.labels.store === name && each.labels.outcome === outcome)?.value ?? 0;
    const asked = found("asked");
    return make("div", { className: "worker" },
      make("p", {}, make("span", {}, name), make("span", {}, `${count(all)} slots`)),
      bar("kept", of("committed"), all, "store"),
      bar("in hand-off", of("reserved") + of("private"), all, "store"),
      bar("found", found("found_memory"), asked, "store"),
      bar("from disk", found("found_disk"), asked, "store"));
  });
  $("stores").replaceChildren(...(cards.length ? cards : [make("p", { className: "quiet" }, "no figures")]));
}

// ── plots ────────────────────────────────────────────────────────────────────────────────────────

const PLOTS = [
  { name: "tokens per second", kind: "decode", said: count },
  { name: "requests per second", kind: "queue", said: count },
  { name: "first token, median", kind: "prefill", said: time },
  { name: "first token, p99", kind: "prefill", said: time },
  { name: "between tokens, median", kind: "decode", said: time },
].map((plot) => ({ ...plot, values: [] }));

function drawPlot(plot) {
  const known = plot.values.filter((each) => each !== null);
  const most = Math.max(1e-9, ...known);
  const points = plot.values.map((each, index) => [index + SAMPLES_MAX - plot.values.length, each]);
  let path = "";
  let drawing = false;
  for (const [x, value] of points) {
    if (value === null) { drawing = false; continue; }
    path += `${drawing ? "L" : "M"}${x} ${60 - (56 * value) / most}`;
    drawing = true;
  }
  plot.path.setAttribute("d", path);
  const latest = known.at(-1);
  plot.figure.textContent = latest === undefined ? "none yet" : plot.said(latest);
  plot.svg.setAttribute("aria-label", `${plot.name}: ${plot.figure.textContent}`);
}

for (const plot of PLOTS) {
  const space = "http://www.w3.org/2000/svg";
  plot.figure = make("b", {}, "none yet");
  plot.svg = document.createElementNS(space, "svg");
  plot.svg.setAttribute("viewBox", `0 0 ${SAMPLES_MAX} 62`);
  plot.svg.setAttribute("preserveAspectRatio", "none");
  plot.svg.setAttribute("role", "img");
  plot.path = document.createElementNS(space, "path");
  plot.path.setAttribute("fill", "none");
  plot.path.setAttribute("stroke-width", "2");
  plot.path.setAttribute("vector-effect", "non-scaling-stroke");
  plot.path.style.stroke = `var(--${plot.kind})`;
  plot.svg.append(plot.path);
  $("plots").append(make("div", { className: "plot" }, make("p", {}, make("span", {}, plot.name), plot.figure), plot.svg));
}

let before = null;

function showRates(samples, at) {
  const now = {
    at,
    tokens: total(samples, "pdserve_generated_tokens_total"),
    requests: total(samples, "pdserve_requests_total"),
    first: buckets(samples, "pdserve_ttft_seconds"),
    between: buckets(samples, "pdserve_inter_token_seconds"),
  };
  if (before !== null) {
    const seconds = (now.at - before.at) / 1000;
    const ms = (quantity, q) => {
      const found = quantile(before[quantity], now[quantity], q);
      return found === null ? null : found * 1000;
    };
    const values = [
      rate(before.tokens, now.tokens, seconds),
      rate(before.requests, now.requests, seconds),
      ms("first", 0.5),
      ms("first", 0.99),
      ms("between", 0.5),
    ];
    PLOTS.forEach((plot, index) => {
      plot.values.push(values[index]);
      plot.values.splice(0, plot.values.length - SAMPLES_MAX);
      drawPlot(plot);
    });
  }
  before = now;
}

// ── one look ─────────────────────────────────────────────────────────────────────────────────────

function say(text, wrong) {
  $("state").textContent = text;
  $("state").classList.toggle("wrong", wrong);
}

async function lookAtAll() {
  try {
    const [status, metrics] = await Promise.all([look("cluster/status"), look("metrics")]);
    const [cluster, samples] = [await status.json(), parseMetrics(await metrics.text())];
    showQueue(cluster);
    for (const role of ["prefill", "decode"]) showPool(cluster, role);
    showStores(samples);
    showRates(samples, performance.now());
    $("access").hidden = true;
    say(`${cluster.workers.length} workers`, false);
    document.body.dataset.looks = String(Number(document.body.dataset.looks ?? 0) + 1);
  } catch (error) {
    say(error.message, true);
  }
  setTimeout(lookAtAll, EVERY_MS);
}

async function nameModel() {
  try {
    const { data } = await (await look("v1/models")).json();
    $("model").textContent = data.map((each) => each.id).join(", ");
  } catch {
    $("model").textContent = "";
  }
}

$("access").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value);
  $("key").value = "";
  nameModel();
});

// ── chat ─────────────────────────────────────────────────────────────────────────────────────────

const messages = [];
let stopping = null;

function showLife(report) {
  const parts = life(report);
  const all = parts.reduce((sum, part) => sum + part.ms, 0);
  $("timeline").replaceChildren(...parts.map((part) => make("span", {
    className: `of-${part.kind}`, title: `${part.name} ${time(part.ms)}`, style: { flex: `${part.ms / all}` },
  })));
  const told = parts.map((part) => `${part.name} ${time(part.ms)}`).join(", ");
  $("timeline").setAttribute("aria-label", told);
  $("life-facts").textContent =
    `${told}. First token after ${time(report.first_token_ms)}; ${report.cached_tokens} tokens were cached; ` +
    `preempted ${report.preempted_count} times, parked ${report.parked_count} times.`;
  $("decisions").tBodies[0].replaceChildren(...(report.decisions ?? []).map((each) => make("tr", {},
    ...[each.reason, time(each.waited_ms), each.level, each.prefill_worker, each.decode_worker,
      each.cached_tokens, time(each.price_ms)].map((value) => make("td", {}, String(value))))));
  $("decisions").hidden = !report.decisions?.length;
  $("life").hidden = false;
}

async function stream(answer, tell) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const found = events(text + value);
    text = found.rest;
    for (const data of found.data) if (data !== "[DONE]") tell(JSON.parse(data));
  }
}

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  messages.push({ role: "user", content: $("text").value });
  const line = make("li", { className: "assistant" });
  $("messages").append(make("li", {}, $("text").value), line);
  $("text").value = "";
  $("send").disabled = true;
  $("stop").disabled = false;
  stopping = new AbortController();
  try {
    const answer = await ask("v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({
        messages, max_tokens: Number($("max").value), stream: true, include_timing: true, pdserve: { why: true },
      }),
      signal: stopping.signal,
    });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    await stream(answer, (chunk) => {
      if (chunk.error) throw new Error(chunk.error.message);
      line.textContent += chunk.choices[0]?.delta?.content ?? "";
      $("messages").scrollTop = $("messages").scrollHeight;
      if (chunk.pdserve) showLife(chunk.pdserve);
    });
    messages.push({ role: "assistant", content: line.textContent });
  } catch (error) {
    line.append(make("span", { className: "wrong" }, error.name === "AbortError" ? " (stopped)" : ` ${error.message}`));
    messages.pop();
  }
  $("send").disabled = false;
  $("stop").disabled = true;
});
$("stop").addEventListener("click", () => stopping?.abort());

nameModel();
lookAtAll();
