// What is said of one scan in words and bars, and the chart of a series.

import { outside, percent, probability } from "./results.js";

const $ = (id) => document.getElementById(id);
const COLOURS = 6;
const SVG = "http://www.w3.org/2000/svg";

export const colourOf = (labels, label) => `var(--c${Math.max(labels.indexOf(label), 0) % COLOURS})`;

function element(name, text = "", className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function facts(list, pairs) {
  list.replaceChildren();
  for (const [name, value, colour] of pairs) {
    const term = element("dt", name);
    if (colour) {
      const swatch = element("span", "", "swatch");
      swatch.style.background = colour;
      term.prepend(swatch);
    }
    list.append(term, element("dd", value, /^[0-9a-f]{32,}$/.test(value) ? "code" : ""));
  }
}

/** The answer for one item; `model` is what /api/model told, null if it is another one by now. */
export function showAnswer(item, model) {
  const { line } = item;
  const isOk = line?.status === "ok";
  const isError = line?.status === "error";
  $("refused").hidden = isOk;
  for (const id of ["label-card", "time-card", "model-card"]) $(id).hidden = !isOk;
  $("warning").hidden = !(isOk && outside(item));
  $("card").hidden = !model;
  if (!isOk) {
    $("refused-title").textContent = !isError
      ? "Not answered yet"
      : line.error.type === "OutOfDomainError" ? "Refused: no axial CT slice" : "Could not be classified";
    $("refused-text").textContent = isError ? line.error.message : "It goes on by itself as soon as the server can take it.";
    return;
  }
  $("reasons").replaceChildren(...(line.reasons ?? []).map((reason) => element("li", reason)));
  $("label-card").classList.toggle("is-doubted", outside(item));
  $("label-eyebrow").textContent = outside(item) ? "Label of the network, not to be relied on" : "Most probable";
  $("label").textContent = line.label;
  const labels = Object.keys(line.probabilities);
  $("bars").replaceChildren(...labels.map((label) => {
    const row = document.createElement("li");
    const track = element("span", "", "track");
    const fill = element("span", "", "fill");
    fill.style.width = `${100 * line.probabilities[label]}%`;
    fill.style.background = colourOf(labels, label);
    track.setAttribute("aria-hidden", "true");
    track.append(fill);
    row.append(element("span", label), element("span", percent(line.probabilities[label]), "value"), track);
    return row;
  }));
  const rest = Math.max(item.totalMs - line.ms.decode - line.ms.infer, 0);
  const parts = [["Decoding", line.ms.decode, "var(--c0)"], ["Model, with wire and queue", line.ms.infer, "var(--c1)"]];
  if (item.isAlone) parts.push(["Upload, page and the rest", rest, "var(--c3)"]);
  const ms = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
  $("times").replaceChildren(...parts.map(([, value, colour]) => {
    const part = document.createElement("span");
    part.style.flex = `${Math.max(value, 0.01)} 0 0`;
    part.style.background = colour;
    return part;
  }));
  const total = item.isAlone ? [["From drop to result", ms(item.totalMs)]] : [];
  facts($("time-facts"), [...parts.map(([name, value, colour]) => [name, ms(value), colour]), ...total]);
  const { name, version, run } = line.model;
  const isSame = model && model.run === run && model.version === version;
  facts($("model-facts"), [
    ["Name", name],
    ["Version", version],
    ["Training run", run],
    ...(isSame ? [["Precision", model.precision.toUpperCase()]] : []),
    ["Distance from training scans", line.domain_distance.toFixed(1)],
    ...(isSame ? [["Limit of that distance", model.domain_threshold.toFixed(1)]] : []),
  ]);
}

const WORDS = {
  protocol: "Scored by protocol",
  n: "Scans scored",
  groups: "Groups (patients or series)",
  balanced_accuracy: "Balanced accuracy",
  macro_auroc: "Macro AUROC",
  calibration_error: "Calibration error",
  precision: "Precision scored",
  run: "Run scored",
};

export function showCard(model) {
  const body = $("card-body");
  const { card } = model;
  if (!card) {
    body.replaceChildren(element("p", "No model card was published with this model: how well it does is not known here."));
    return;
  }
  const text = (value) => {
    if (!Array.isArray(value)) return String(value).replaceAll("_", " ");
    const [middle, low, high] = value.map((number) => (number === null ? null : Number(number).toFixed(3)));
    return low === null || high === null ? (middle ?? "not known") : `${middle} (${low} to ${high})`;
  };
  const list = element("dl", "", "facts");
  facts(list, Object.entries(WORDS).filter(([key]) => key in card).map(([key, word]) => [word, text(card[key])]));
  const other = card.run !== model.run ? "The scores are those of the full network that this model was made from. " : "";
  body.replaceChildren(
    list,
    element("p", `${other}In brackets: the interval that holds the value with 95 % confidence.`, "muted"),
    element("p", card.notice ?? model.notice),
  );
}

/** Probability of one label over the slices of a series, with the slices out of domain marked. */
export function showChart(series, current, label) {
  const chart = $("chart");
  const done = series.filter((item) => item.line?.status === "ok");
  const labels = Object.keys(done[0]?.line.probabilities ?? {});
  const x = (i) => (series.length < 2 ? 500 : 12 + (976 * i) / (series.length - 1));
  const y = (value) => 8 + 66 * (1 - value);
  const points = series.map((item, i) => [x(i), item.line?.probabilities?.[label]]).filter(([, value]) => value !== undefined);
  const curve = points.map(([at, value], i) => `${i ? "L" : "M"}${at.toFixed(1)} ${y(value).toFixed(1)}`).join("");
  const part = (name, attributes) => {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  chart.style.color = colourOf(labels, label);
  const now = x(series.indexOf(current));
  chart.replaceChildren(
    part("path", { class: "half", d: `M0 ${y(0.5)}H1000` }),
    ...(points.length ? [
      part("path", { class: "area", d: `${curve}L${points.at(-1)[0]} ${y(0)}L${points[0][0]} ${y(0)}Z` }),
      part("path", { class: "curve", d: curve }),
    ] : []),
    ...series.flatMap((item, i) => (outside(item) ? [part("rect", { class: "outside", x: x(i) - 3, y: 80, width: 6, height: 6 })] : [])),
    part("path", { class: "now", d: `M${now} 0V90` }),
  );
  const most = done.reduce((best, item) => (item.line.probabilities[label] > (best?.line.probabilities[label] ?? -1) ? item : best), null);
  const numOutside = done.filter(outside).length;
  $("chart-text").textContent = most
    ? `Probability of ${label} over ${series.length} slices: most in slice ${series.indexOf(most) + 1} (${percent(most.line.probabilities[label])})`
      + (numOutside ? `; ${numOutside} out of domain (marked below)` : "")
    : "No slice is classified yet";
}

export function tallyOf(items) {
  const done = items.filter((item) => item.line);
  const errors = done.filter((item) => item.line.status === "error").length;
  const doubted = done.filter(outside).length;
  const parts = [done.length < items.length ? `${done.length} of ${items.length}` : `${items.length}`];
  if (doubted) parts.push(`${doubted} out of domain`);
  if (errors) parts.push(`${errors} failed`);
  return parts.join(", ");
}

export function spoken(item) {
  const { line } = item;
  if (line.status === "error") return `${item.name}: ${line.error.message}`;
  const words = `${line.label}, ${percent(probability(item))}`;
  return outside(item) ? `${item.name}: out of domain, do not rely on the label. ${line.reasons.join(". ")}. Label: ${words}` : `${item.name}: ${words}`;
}
