// Looks at the cluster every second and shows it. All text that comes from outside is set as text.

import {
  buckets, choices, count, events, life, parseMetrics, pools, quantile, rate, stores, time, total, whereabouts,
} from "./figures.js";

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

/** Null where this gateway has no such page. */
async function lookIfThere(path) {
  const answer = await ask(path, { signal: AbortSignal.timeout(GIVE_UP_MS) });
  return answer.ok ? answer : null;
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

/** Elements by name in `place`, made once and updated in place, so that the keyboard's focus stays. */
function keyed(place, things, nameOf, create, none) {
  const there = new Map([...place.children].map((child) => [child.dataset.name, child]));
  const wanted = things.map((thing) => {
    const element = there.get(nameOf(thing)) ?? create(thing);
    element.dataset.name = nameOf(thing);
    element.update(thing);
    return element;
  });
  if (!wanted.length && none) wanted.push(none());
  if (wanted.length !== place.children.length || wanted.some((each, index) => each !== place.children[index])) {
    place.replaceChildren(...wanted);
  }
}

function workerCard() {
  const [name, state, bars, actions] = [make("span"), make("span"), make("div"), make("div", { className: "actions" })];
  const card = make("div", { className: "worker" }, make("p", {}, name, state), bars, actions);
  card.update = ({ worker, mode, role }) => {
    const used = worker.block_count - worker.free_blocks;
    name.textContent = worker.model ? `${worker.worker} (${worker.model})` : worker.worker;
    const does = worker.draining ? "leaves, " : worker.duty === "none" ? "drained, " : "";
    state.textContent = `${does}${worker.running} run, ${worker.waiting} wait`;
    bars.replaceChildren(
      bar("running", worker.running, worker.running_max, role),
      bar("blocks", used, worker.block_count, role, `${Math.round((100 * used) / worker.block_count)} %`));
    const offered = choices(worker, mode);
    const said = offered.map((each) => each.label).join();
    if (card.dataset.offers !== said) {
      const hadFocus = actions.contains(document.activeElement);
      actions.replaceChildren(...offered.map((each) => make("button", {
        type: "button", textContent: each.label, ariaLabel: `${worker.worker}: ${each.label}`,
        onclick: () => confirmRole(worker.worker, each),
      })));
      card.dataset.offers = said;
      if (hadFocus) actions.firstElementChild?.focus();
    }
  };
  return card;
}

function showPool(status, role) {
  const workers = status.workers.filter((each) => each.role === role);
  keyed($(role), workers.map((worker) => ({ worker, mode: (status.models?.[worker.model] ?? status).mode, role })), (each) => each.worker.worker, workerCard,
    () => make("p", { className: "quiet" }, "no worker of this kind"));
}

function showPhases(status) {
  const live = whereabouts(status.phases);
  $("phases").textContent = `Live requests: ${live.length ? live.join(", ") : "none"}.`;
}

// ── what an operator does ────────────────────────────────────────────────────────────────────────

let chosen = null;

function confirmRole(worker, choice) {
  chosen = { worker, role: choice.role };
  $("confirm-title").textContent = `${worker}: ${choice.label}`;
  $("confirm-text").textContent = choice.question;
  $("confirm-wrong").textContent = "";
  $("confirm").showModal();
  $("confirm-no").focus();
}

$("confirm-no").addEventListener("click", () => $("confirm").close());
$("do").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("confirm-yes").disabled = true;
  try {
    const answer = await ask("cluster/role", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(chosen),
      signal: AbortSignal.timeout(GIVE_UP_MS),
    });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    $("acted").textContent = `${chosen.worker}: ${chosen.role === "none" ? "drained" : chosen.role} from now on`;
    $("confirm").close();
  } catch (error) {
    $("confirm-wrong").textContent = error.message;
  }
  $("confirm-yes").disabled = false;
});

// ── autoscaler ───────────────────────────────────────────────────────────────────────────────────

const CHANGES_SHOWN = 10;

function row(...values) {
  return make("tr", {}, ...values.map((value) => make("td", {}, String(value))));
}

function showScaling(said) {
  $("scaling").hidden = false;
  $("wanted").caption.textContent =
    said.dry_run ? "What it would want now, and why; it is in a dry run and changes nothing" : "What it wants now, and why";
  $("wanted").tBodies[0].replaceChildren(...pools(said).map((each) =>
    row(each.pool, each.workers, each.wanted, each.bounds, each.demand, each.why)));
  $("changes").tBodies[0].replaceChildren(...said.changes.slice(-CHANGES_SHOWN).reverse().map((each) =>
    row(time(said.now_ms - each.at_ms), each.pool, each.before, each.wanted, each.demand.toFixed(2), each.why)));
  $("changes").hidden = !said.changes.length;
}

// ── the store ────────────────────────────────────────────────────────────────────────────────────

function showStores(samples) {
  const cards = stores(samples).map((each) => make("div", { className: "worker" },
    make("p", {}, make("span", {}, each.store), make("span", {}, `${count(each.slots)} slots`)),
    bar("kept", each.kept, each.slots, "store"),
    bar("in hand-off", each.inHandoff, each.slots, "store"),
    bar("found", each.fromMemory, each.asked, "store"),
    bar("from disk", each.fromDisk, each.asked, "store"),
    make("p", { className: "quiet" }, `${each.handoffs} hand-offs, ${each.waiting} wait for room`)));
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

/** Names them again when one has come or gone. */
function showModels(names) {
  const known = served.filter((each) => each.parent === null).map((each) => each.id);
  if (names.length ? String(names.sort()) !== String(known.sort()) : known.length > 1) nameModel();
}

async function lookAtAll() {
  try {
    const [status, metrics, requests, scaling] = await Promise.all(
      [look("cluster/status"), look("metrics"), look("cluster/requests"), lookIfThere(`cluster/autoscaling${whose()}`)]);
    const [cluster, samples] = [await status.json(), parseMetrics(await metrics.text())];
    showQueue(cluster);
    showPhases(cluster);
    showRequests((await requests.json()).requests);
    showModels(Object.keys(cluster.models ?? {}));
    if (scaling) showScaling(await scaling.json());
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

let served = [];

/** The model whose autoscaler is shown: the one that is chosen for the chat, or what it adapts. */
function whose() {
  const chosen = served.find((each) => each.id === $("which").value);
  return chosen ? `?model=${encodeURIComponent(chosen.parent ?? chosen.id)}` : "";
}

async function nameModel() {
  try {
    const { data } = await (await look("v1/models")).json();
    $("model").textContent = data.map((each) => each.id).join(", ");
    served = data;
    const chosen = $("which").value;
    $("which").replaceChildren(...data.map((each) => make("option", { value: each.id }, each.id)));
    if (data.some((each) => each.id === chosen)) $("which").value = chosen;
    $("of-which").hidden = data.length < 2;
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

// ── the latest requests ──────────────────────────────────────────────────────────────────────────

const REQUESTS_SHOWN = 12;

function requestRow() {
  let shown = null;
  const button = make("button", { type: "button", onclick: () => { showLife(shown); $("life-title").focus(); } });
  const cells = Array.from({ length: 9 }, () => make("td"));
  cells[0].append(button);
  const line = make("tr", {}, ...cells);
  line.update = (each) => {
    shown = each;
    button.textContent = each.call;
    button.disabled = each.queue_ms === undefined;
    const said = [each.model, each.tenant, each.status, each.prompt_tokens, each.cached_tokens ?? "", each.generated_tokens,
      time(each.first_token_ms), time(each.total_ms)];
    said.forEach((value, index) => { cells[index + 1].textContent = String(value); });
  };
  return line;
}

function showRequests(requests) {
  keyed($("requests").tBodies[0], requests.slice(0, REQUESTS_SHOWN), (each) => `${each.call} ${each.ended_unix_ms}`, requestRow);
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
        model: $("which").value || undefined, messages, max_tokens: Number($("max").value), stream: true, include_timing: true, pdserve: { why: true },
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
