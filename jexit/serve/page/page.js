"use strict";
// Texts of the model reach the page through textContent only, so they cannot become markup.

const byId = (name) => document.getElementById(name);
const SHADES = 10;
let served = null;
let stopping = null;

function say(text) { byId("message").textContent = text; }

function headers() {
  const key = byId("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function fault(response) {
  try { return (await response.json()).error.message; } catch { return `status ${response.status}`; }
}

async function open() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (response.status === 401) {
    byId("keyfield").hidden = false;
    return null;
  }
  if (!response.ok) throw new Error(await fault(response));
  const model = (await response.json()).data[0];
  byId("model").textContent =
    `${model.id}: ${model.layers} layers, exits after ${model.exit_layers.join(", ") || "none"}. ` +
    "Each token is coloured by the number of layers that ran for it.";
  byId("most").max = model.max_new_tokens;
  byId("most").value = Math.min(Number(byId("most").value), model.max_new_tokens);
  const steps = byId("steps");
  steps.replaceChildren();
  for (let shade = 0; shade < SHADES; shade++) {
    const step = document.createElement("i");
    step.className = `d${shade}`;
    steps.append(step);
  }
  byId("scale").hidden = false;
  return model;
}

function shadeOf(depth) {
  return Math.round(((SHADES - 1) * (depth - 1)) / Math.max(served.layers - 1, 1));
}

function tipOf(token, depth, logprob, hazards) {
  const lines = [JSON.stringify(token), `${depth} of ${served.layers} layers`];
  lines.push(`probability ${Math.exp(logprob).toFixed(3)}`);
  hazards.forEach((hazard, exit) => {
    if (hazard === null) return;
    lines.push(`hazard at ${served.exit_layers[exit]}: ${hazard.toFixed(3)}`);
  });
  return lines.join("\n");
}

function showTip(event) {
  const tip = byId("tip");
  const text = event.target.dataset && event.target.dataset.tip;
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const box = event.target.getClientRects()[0];
  const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = `${Math.max(8, Math.min(box.left, room)) + window.scrollX}px`;
  tip.style.top = `${box.bottom + 6 + window.scrollY}px`;
}

async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += decoder.decode(value, { stream: true });
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function numbers(side, sums) {
  const { tokens, layers, seconds } = sums;
  const share = tokens ? (100 * layers) / (tokens * served.layers) : 0;
  byId(`numbers-${side}`).textContent =
    `${tokens} tokens, ${layers} layers (${share.toFixed(0)} % of all), ${seconds.toFixed(2)} s`;
}

async function complete(side, policy) {
  const text = byId(`text-${side}`);
  const sums = { tokens: 0, layers: 0, seconds: 0 };
  // A character may be split over tokens: the last of them shows it, the spans before stay empty.
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  const began = performance.now();
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: headers(),
    signal: stopping.signal,
    body: JSON.stringify({
      messages: [{ role: "user", content: byId("prompt").value }],
      max_tokens: Number(byId("most").value),
      temperature: Number(byId("temperature").value),
      seed: 0, stream: true, logprobs: true, hazards: true, policy,
    }),
  });
  if (!response.ok) throw new Error(await fault(response));
  for await (const chunk of events(response.body)) {
    if (chunk.error) throw new Error(chunk.error.message);
    for (const choice of chunk.choices) {
      choice.logprobs.content.forEach((entry, place) => {
        const depth = choice.depths[place];
        const span = document.createElement("span");
        span.textContent = decoder.decode(new Uint8Array(entry.bytes), { stream: true });
        span.className = `d${shadeOf(depth)}`;
        const shown = span.textContent || entry.token;
        span.dataset.tip = tipOf(shown, depth, entry.logprob, choice.hazards[place]);
        text.append(span);
        sums.tokens += 1;
        sums.layers += depth;
      });
    }
    sums.seconds = (performance.now() - began) / 1000;
    numbers(side, sums);
  }
  if (text.lastChild) text.lastChild.textContent += decoder.decode(); // a character left unfinished
  return sums;
}

async function run() {
  say("");
  byId("saved").textContent = "";
  for (const side of ["early", "full"]) {
    byId(`text-${side}`).replaceChildren();
    byId(`numbers-${side}`).textContent = "–";
  }
  stopping = new AbortController();
  byId("run").disabled = true;
  byId("stop").disabled = false;
  try {
    served = served || (await open());
    if (!served) throw new Error("the server asks for its API key; enter it and run again");
    // One after the other, so that each has the machine to itself.
    const early = await complete("early", `threshold:${byId("threshold").value}`);
    const full = await complete("full", "full");
    const layers = 100 * (1 - early.layers / full.layers);
    const time = full.seconds / early.seconds;
    byId("saved").textContent =
      `The exits saved ${layers.toFixed(0)} % of the layers; all layers took ${time.toFixed(2)} times as long.`;
  } catch (error) {
    say(error.name === "AbortError" ? "stopped" : error.message);
  } finally {
    byId("run").disabled = false;
    byId("stop").disabled = true;
  }
}

byId("form").addEventListener("submit", (event) => { event.preventDefault(); run(); });
byId("stop").addEventListener("click", () => stopping && stopping.abort());
byId("threshold").addEventListener("input", (event) => {
  byId("shown").textContent = Number(event.target.value).toFixed(2);
});
document.addEventListener("mouseover", showTip);
open().then((model) => { served = model; }, (error) => say(error.message));
