// Polls the server's state and shows it; stops while nobody looks.

import { digits, element, strip, trace } from "/live/draw.js";

const POLL_MS = 250, PATIENCE_MS = 4000, IDLE_S = 2, ROOM = 120;
const MOODS = { running: "good", fault: "bad" };
const UNITS = { bytes: "", mhz: "MHz", hz: "Hz", c: "°C", mw: "mW", w: "W", mv: "mV", percent: "%", s: "s", ms: "ms", rpm: "rpm" };

const by = (id) => document.getElementById(id);
const put = (id, ...children) => by(id).replaceChildren(...children);
let paused = false, shown = -1;

function status(mood, text) {
  const place = by("status");
  place.dataset.mood = mood;
  // Screen readers speak at every change.
  if (place.textContent !== text) place.textContent = text;
}

function trouble(text) {
  by("trouble").hidden = !text;
  by("trouble").textContent = text;
}

function plain(value) {
  if (typeof value === "number") return Number.isInteger(value) ? String(value) : String(+value.toFixed(2));
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (Array.isArray(value)) {
    const numbers = value.every((part) => typeof part === "number");
    if (numbers && value.length > 6) return `${plain(Math.min(...value))} to ${plain(Math.max(...value))} (${value.length})`;
    return value.map(plain).filter(Boolean).join(", ");
  }
  if (value !== null && typeof value === "object") {
    return Object.entries(value)
      .filter(([, part]) => part !== null && part !== "")
      .map(([name, part]) => (name === "name" ? plain(part) : `${name.replaceAll("_", " ")} ${plain(part)}`))
      .join(" ");
  }
  return value ?? "";
}

// A name such as memory_available_bytes says its unit.
function figure(name, value) {
  const parts = name.split("_"), unit = parts.length > 1 ? parts.at(-1) : "";
  if (unit === "bytes" && typeof value === "number") return [parts.slice(0, -1).join(" "), `${(value / 1e9).toFixed(2)} GB`];
  const text = plain(value);
  return unit in UNITS && text ? [parts.slice(0, -1).join(" "), `${text} ${UNITS[unit]}`] : [parts.join(" "), text];
}

function list(id, pairs) {
  put(id, ...pairs.filter(([, text]) => text !== "").flatMap(([name, text]) =>
    [element("dt", {}, name), element("dd", {}, text)]));
}

function showCameras(latest) {
  const place = by("cameras");
  if (place.children.length !== latest.cameras.length) {
    put("cameras", ...latest.cameras.map(() => element("figure", {}, element("img"), element("figcaption"))));
  }
  latest.cameras.forEach(({ name, width, height }, index) => {
    const [image, caption] = place.children[index].children;
    image.alt = `Camera ${name}`;
    caption.textContent = `${name}, ${width}×${height}`;
    // A slow phone skips pictures; it does not queue them.
    if (!image.src || image.complete) image.src = `/live/picture/${index}?n=${latest.number}`;
  });
}

function showActions({ actions }, limits) {
  by("limits-known").textContent = limits
    ? `${actions.length} steps from left to right; the band is what the limits allow`
    : `${actions.length} steps from left to right; this policy does not say its limits`;
  put("actions", ...actions[0].map((value, dimension) => {
    const values = actions.map((action) => action[dimension]);
    const range = limits && [limits[0][dimension], limits[1][dimension]];
    const outside = range && values.some((v) => v < range[0] || v > range[1]);
    const label = `Dimension ${dimension}: ${digits(value)}` + (range ? `, limits ${digits(range[0])} to ${digits(range[1])}` : "");
    const told = element("span", { class: "value" }, digits(value));
    if (range) told.append(element("small", {}, `${digits(range[0])} … ${digits(range[1])}`));
    return element("div", { class: outside ? "dimension outside" : "dimension" },
      element("span", { class: "name" }, String(dimension)), trace(values, range, label), told);
  }));
}

function showLatency(now) {
  const sorted = [...now.recent_ms].sort((a, b) => a - b);
  const at = (share) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
  const deadline = now.deadline_ms === null ? "" : `, deadline ${digits(now.deadline_ms)} ms missed ${now.counts.misses} times`;
  by("latency").textContent = sorted.length
    ? `p50 ${digits(at(0.5))} ms, p90 ${digits(at(0.9))} ms, max ${digits(sorted.at(-1))} ms of the last ${sorted.length}${deadline}`
    : "No action yet";
  put("strip", strip(now.recent_ms, now.deadline_ms, ROOM));
  if (!now.latest) return;
  const { total, ...stages } = now.latest.timing_ms;
  // "engine.decoder" is a part of "engine".
  const part = (name) => name.includes(".") && name.slice(0, name.lastIndexOf(".")) in stages;
  const label = (name) => part(name) ? name.slice(name.lastIndexOf(".") + 1).replaceAll("_", " ") : name;
  put("stages", ...Object.entries(stages).map(([name, ms]) =>
    element("div", { class: part(name) ? "stage part" : "stage" }, element("span", {}, label(name)),
      element("meter", { min: 0, max: total, value: ms, "aria-label": `${name} ${digits(ms)} ms of ${digits(total)} ms` }),
      element("span", { class: "value" }, `${digits(ms)} ms`))));
}

function showCounts(now) {
  const errors = Object.entries(now.counts.errors).map(([kind, count]) => `${kind} ${count}`).join(", ");
  const failed = now.failed && `${now.failed.kind}, ${ago(now.failed.age_s)} ago: ${now.failed.message}`;
  const kept = now.recording && `${now.recording.file}: ${now.recording.written} written, ${now.recording.dropped} dropped`;
  const slot = now.loop && [
    ["slot", String(now.loop.slot)],
    ["command", now.loop.command ? now.loop.command.map(digits).join(", ") : "none"],
    ["sent late by", now.loop.late_ms === null ? "" : `${digits(now.loop.late_ms)} ms`],
    ["observation age", now.loop.age_ms === null ? "" : `${digits(now.loop.age_ms)} ms`],
    ...Object.entries(now.loop.counters).map(([name, count]) => [name.replaceAll("_", " "), String(count)]),
  ];
  list("board", Object.entries(now.board).map(([name, value]) => figure(name, value)));
  list("counts", [
    ...(slot ?? []),
    ["bundle", now.policy.bundle_digest.slice(0, 16)], ["target", now.policy.target],
    ["up", ago(now.uptime_s)], ["actions", String(now.counts.actions)],
    ["errors", errors || "none"], ["last error", failed ?? ""], ["recording", kept || "off"],
  ]);
}

function ago(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function show(now) {
  const { latest } = now;
  by("policy").textContent = `${now.policy.unnorm_key} · ${now.policy.horizon} × ${now.policy.action_dim} actions`;
  if (!latest) status("wait", "No action yet");
  else if (now.loop) status(MOODS[now.loop.state] ?? "warn", now.loop.state);
  else if (latest.age_s < IDLE_S) status("good", "Live");
  else status("warn", `Idle ${ago(latest.age_s)}`);
  const failing = now.failed && (!latest || now.failed.age_s < latest.age_s);
  const lost = now.recording?.failure && `Nothing is recorded any more: ${now.recording.failure}`;
  trouble(failing ? `No action: ${now.failed.message}` : lost || "");
  showLatency(now);
  showCounts(now);
  if (!latest || latest.number === shown) return;
  shown = latest.number;
  by("instruction").textContent = latest.instruction;
  by("state-size").textContent = latest.state.length ? `${latest.state.length} numbers` : "none";
  put("state", ...latest.state.map((value) => element("li", {}, digits(value))));
  showCameras(latest);
  showActions(latest, now.limits);
}

async function poll() {
  if (!paused && !document.hidden) {
    try {
      // From the origin: a page opened as http://user:token@robot/ may not fetch its own address.
      const reply = await fetch(new URL("/live/state", location.origin), { signal: AbortSignal.timeout(PATIENCE_MS) });
      if (!reply.ok) throw new Error(reply.status === 401 ? "the token is not accepted any more, reload the page" : `the server says ${reply.status}`);
      const now = await reply.json();
      if (!paused) show(now);
    } catch (error) {
      status("bad", "Connection lost");
      trouble(`${error.message}; what is shown is old. Trying again.`);
    }
  }
  setTimeout(poll, POLL_MS);
}

by("pause").addEventListener("click", () => {
  paused = !paused;
  by("pause").textContent = paused ? "Resume" : "Pause";
  by("pause").setAttribute("aria-pressed", String(paused));
  if (paused) status("wait", "Paused");
});

poll();
