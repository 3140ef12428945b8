// The page: what was dropped is sent file by file, and what comes back is shown.

import { classify, pixelsOf, readModel, setToken } from "./api.js";
import { showAnswer, showCard, showChart, spoken, tallyOf } from "./panels.js";
import { Results, csvOf, records, save } from "./results.js";
import { Viewer } from "./viewer.js";

const $ = (id) => document.getElementById(id);
const AT_ONCE = 3;
const MOST_TRIES = 3;
const LOOK_EVERY_MS = 5000;
const LOOK_AGAIN_MS = 1500;
// Of one slice; the server was away and the file is sent again.
const PASSING = new Set(["ServerUnavailableError", "InferenceTimeoutError", "ContractError"]);
const WHOLE = { left: 0, top: 0, right: 1, bottom: 1 };

let model = null;
let isUp = false;
let lookTimer = 0;
let current = null;
let visit = new AbortController();
const queue = [];
let numSending = 0;
const view = { window: { center: -600, width: 1500 }, label: "", opacity: 0 };

const results = new Results(document.querySelector("table"), choose);
const original = new Viewer($("original"), $("original-readout"), { window: setWindow, step });
const network = new Viewer($("network"), $("network-readout"), { step });

/* The model */

async function look() {
  clearTimeout(lookTimer);
  try {
    const found = await readModel();
    const isNew = !model || model.run !== found.run || model.version !== found.version || model.precision !== found.precision;
    model = found;
    isUp = true;
    $("server").dataset.state = "ready";
    $("server-text").textContent = `${model.name} version ${model.version}, ${model.precision.toUpperCase()}, ready`;
    $("trouble").hidden = true;
    if (isNew) {
      showCard(model);
      if (current) show();
    }
    pump();
  } catch (error) {
    isUp = false;
    if (error.status === 401) return askToken();
    const isContract = error.kind === "ContractError";
    $("server").dataset.state = "trouble";
    $("server-text").textContent = isContract ? "another model" : "no model";
    $("trouble-title").textContent = isContract
      ? "The server has a model that this page was not made for."
      : error.status ? "The model server does not answer." : "This page has lost its own server.";
    $("trouble-text").textContent = `Scans wait and go on by themselves. (${error.message})`;
    $("trouble").hidden = false;
  }
  lookTimer = setTimeout(look, isUp ? LOOK_EVERY_MS : LOOK_AGAIN_MS);
}

function askToken() {
  clearTimeout(lookTimer);
  $("token-wrong").hidden = !sessionStorage.getItem("chestct-token");
  if (!$("token-box").open) $("token-box").showModal();
}

$("token-send").addEventListener("click", () => {
  setToken($("token").value.trim());
  $("token").value = "";
  $("token-box").close();
  look();
});
$("token").addEventListener("keydown", (event) => event.key === "Enter" && $("token-send").click());
$("token-box").addEventListener("cancel", (event) => event.preventDefault());

/* Sending */

function add(files) {
  if (!files.length) return;
  const started = performance.now();
  for (const [file, name] of files) {
    const item = { name, state: "queued", upload: null, line: null };
    item.upload = { file, name, started, isRetried: false, numFailed: 0, items: [item] };
    results.items.push(item);
    const limit = model?.limits.upload_bytes;
    if (limit && file.size + 1024 > limit) {
      fail(item, `${name}: ${Math.ceil(file.size / 2 ** 20)} MiB, which is more than the ${Math.floor(limit / 2 ** 20)} MiB that one upload may have.`);
    } else queue.push(item.upload);
  }
  document.body.classList.add("has-scans");
  $("results").hidden = false;
  refresh();
  pump();
}

function fail(item, message, kind = "UploadError") {
  item.line = { path: item.name, status: "error", error: { type: kind, message }, notice: model?.notice ?? "" };
  item.state = "done";
  if (!current) choose(item);
}

function pump() {
  while (isUp && numSending < AT_ONCE && queue.length) {
    numSending++;
    send(queue.shift()).finally(() => {
      numSending--;
      refresh();
      pump();
    });
  }
}

async function send(upload) {
  const { signal } = visit;
  const [first] = upload.items;
  first.state = "sending";
  results.render();
  try {
    let count = 0;
    for await (const line of classify(upload.file, upload.name, signal)) {
      if (signal.aborted) return;
      if (line.status === "error" && PASSING.has(line.error.type)) throw Object.assign(new Error(line.error.message), { kind: line.error.type });
      take(upload, count++, line);
    }
    if (!count) fail(first, `${upload.name}: nothing in it could be read.`);
    for (const item of upload.items) item.isAlone = count === 1 && !upload.isRetried;
    if (upload.items.includes(current)) show();
  } catch (error) {
    if (signal.aborted) return;
    if (error.status >= 400 && error.status < 500 && ![401, 408, 429].includes(error.status)) {
      fail(first, `${upload.name}: ${error.message}`, error.kind);
      return;
    }
    // Where the server is there and the answer still fails, it is not sent for ever.
    const isAway = error instanceof TypeError || [401, 408, 429, 503].includes(error.status) || ["ServerUnavailableError", "ContractError"].includes(error.kind);
    if (!isAway && ++upload.numFailed >= MOST_TRIES) fail(first, `${upload.name}: ${error.message}`, error.kind);
    else hold(upload, error);
  }
}

/** Keeps a file for later: the server is away, busy, or asks for a token. */
function hold(upload, error) {
  const [first, ...more] = upload.items;
  results.items = results.items.filter((item) => !more.includes(item));
  upload.items = [first];
  upload.isRetried = true;
  first.line = null;
  first.state = "held";
  if (more.includes(current)) choose(first);
  else if (current === first) show();
  if (error.status === 429 || error.status === 408) {
    setTimeout(() => { queue.unshift(upload); pump(); }, 1000 * (error.retryAfter || 2));
    return;
  }
  queue.unshift(upload);
  isUp = false;
  clearTimeout(lookTimer);
  lookTimer = setTimeout(look, LOOK_AGAIN_MS / 3);
}

function take(upload, index, line) {
  let item = upload.items[index];
  if (!item) {
    item = { upload, state: "done", line: null };
    results.items.splice(results.items.indexOf(upload.items.at(-1)) + 1, 0, item);
    upload.items.push(item);
  }
  item.name = line.path;
  item.line = line;
  item.state = "done";
  item.totalMs = performance.now() - upload.started;
  if (line.view) {
    const { network: seen, original: whole, ...rest } = line.view;
    item.view = {
      ...rest,
      network: { ...seen, pixels: pixelsOf(seen), data: null, box: WHOLE },
      original: { ...whole, pixels: pixelsOf(whole), data: null, box: rest.box, inverted: rest.inverted },
    };
    delete line.view;
  }
  $("announce").textContent = spoken(item);
  if (!current || current === item) choose(item);
  refresh();
}

let isWaiting = false;
function refresh() {
  if (isWaiting) return;
  isWaiting = true;
  setTimeout(() => {
    isWaiting = false;
    results.render();
    if (current) results.mark(current);
    const { items } = results;
    const numDone = items.filter((item) => item.line).length;
    $("tally").textContent = tallyOf(items);
    $("progress").hidden = numDone === items.length;
    const part = Math.round((100 * numDone) / Math.max(items.length, 1));
    $("progress").setAttribute("aria-valuenow", part);
    $("progress").firstElementChild.style.width = `${part}%`;
    for (const id of ["save-csv", "save-json"]) $(id).disabled = !numDone;
    if (current) showSeries();
  }, 30);
}

/* Showing */

function choose(item) {
  current = item;
  results.render();
  results.mark(item);
  document.body.classList.add("has-choice");
  $("answer").hidden = false;
  $("look").hidden = false;
  show();
}

function show() {
  const { line } = current;
  showAnswer(current, model);
  $("look-title").textContent = current.name;
  const shown = current.view;
  const hasMap = Boolean(shown && line?.probabilities);
  for (const node of document.querySelectorAll(".tools, .pictures, .hint")) node.hidden = !shown;
  $("map-legend").hidden = true;
  $("look-facts").textContent = "";
  if (!shown) return showSeries();
  const { size, position_mm: position } = shown;
  $("look-facts").textContent = `${size.width} × ${size.height} pixels` + (position === null ? "" : `, position ${position.toFixed(1)} mm`);
  const isHu = shown.original.kind === "int16";
  $("window-tool").disabled = !isHu;
  $("original-facts").textContent = isHu ? "Hounsfield units" : "windowed already";
  $("network-facts").textContent = `${shown.network.width} × ${shown.network.height}` + (model && isHu ? `, ${model.window.center_hu}/${model.window.width_hu} HU` : "");
  const labels = hasMap ? Object.keys(line.probabilities) : [];
  const select = $("map-label");
  if ([...select.options].map((option) => option.value).join() !== labels.join()) {
    select.replaceChildren(...labels.map((label) => new Option(label, label)));
    view.label = "";
  }
  if (!view.isLabelChosen) view.label = line.label;
  select.value = view.label || line.label;
  original.setWindow(view.window.center, view.window.width);
  original.show(shown.original);
  network.show(shown.network);
  $("original").setAttribute("aria-label", `${current.name} as it was sent`);
  $("network").setAttribute("aria-label", `${current.name} as the network saw it`);
  showMap();
  showSeries();
}

function showMap() {
  const shown = current?.view;
  const maps = shown?.activation_map ?? {};
  const label = $("map-label").value;
  const most = Math.max(0, ...Object.values(maps).flat(2)); // one scale for all classes
  const isOn = view.opacity > 0 && label in maps;
  for (const viewer of [original, network]) viewer.setHeat(isOn ? maps[label] : null, most, view.opacity);
  $("map-opacity-text").value = view.opacity ? `${Math.round(100 * view.opacity)} %` : "off";
  $("map-legend").hidden = !isOn;
  $("map-legend-text").textContent = `Evidence for ${label}`;
  $("map-legend-max").textContent = most.toFixed(1);
}

function seriesOf(item) {
  const key = item.view?.series;
  const isMember = (other) => (key ? other.view?.series === key : other.upload === item.upload);
  const found = results.items.filter((other) => other === item || isMember(other));
  const place = (other) => other.view?.position_mm ?? null;
  const hasPlaces = found.every((other) => place(other) !== null);
  return hasPlaces ? found.sort((a, b) => place(b) - place(a)) : found; // from the head down
}

function showSeries() {
  const series = seriesOf(current);
  const isSeries = series.length > 1;
  $("series").hidden = !isSeries;
  $("hint-series").hidden = !isSeries;
  if (!isSeries) return;
  const index = series.indexOf(current);
  $("slice").max = series.length;
  $("slice").value = index + 1;
  const position = current.view?.position_mm;
  $("slice-text").value = `${index + 1} of ${series.length}` + (position == null ? "" : `, ${position.toFixed(1)} mm`);
  $("slice").setAttribute("aria-valuetext", `${$("slice-text").value}, ${current.line ? spoken(current) : "waiting"}`);
  const labels = Object.keys(series.find((item) => item.line?.probabilities)?.line.probabilities ?? {});
  showChart(series, current, view.isLabelChosen ? view.label : strongest(series, labels));
}

/** The label with the most evidence against `normal` in any slice: what one looks for. */
function strongest(series, labels) {
  const peak = (label) => Math.max(...series.map((item) => item.line?.probabilities?.[label] ?? 0));
  const wanted = labels.filter((label) => label !== "normal");
  return (wanted.length ? wanted : labels).reduce((best, label) => (peak(label) > peak(best) ? label : best), wanted[0] ?? labels[0]);
}

function step(by) {
  const series = seriesOf(current);
  if (series.length < 2) return false;
  const next = series[series.indexOf(current) + by];
  if (next) choose(next);
  return true;
}

function setWindow(center, width) {
  view.window = { center, width };
  $("window-center").value = center;
  $("window-width").value = width;
  for (const button of document.querySelectorAll("[data-window]")) {
    const isPreset = button.dataset.window === `${center},${width}`;
    const isCustom = button.dataset.window === "custom" && !document.querySelector(`[data-window="${center},${width}"]`);
    button.setAttribute("aria-pressed", isPreset || isCustom);
  }
  original.setWindow(center, width);
}

/* Controls */

for (const button of document.querySelectorAll("[data-window]")) {
  button.addEventListener("click", () => {
    if (button.dataset.window === "custom") $("window-center").focus();
    else setWindow(...button.dataset.window.split(",").map(Number));
  });
}
for (const id of ["window-center", "window-width"]) {
  $(id).addEventListener("input", () => {
    const [center, width] = [$("window-center").valueAsNumber, $("window-width").valueAsNumber];
    if (Number.isFinite(center) && width >= 2) setWindow(center, width);
  });
}
$("map-label").addEventListener("change", () => {
  view.label = $("map-label").value;
  view.isLabelChosen = true;
  if (!view.opacity) setOpacity(60);
  showMap();
  showSeries();
});
function setOpacity(part) {
  $("map-opacity").value = part;
  view.opacity = part / 100;
}
$("map-opacity").addEventListener("input", () => {
  view.opacity = $("map-opacity").value / 100;
  showMap();
});
$("view-reset").addEventListener("click", () => {
  original.reset();
  network.reset();
  setWindow(model?.window.center_hu ?? -600, model?.window.width_hu ?? 1500);
});
$("slice").addEventListener("input", () => choose(seriesOf(current)[$("slice").value - 1]));
$("chart").addEventListener("pointerdown", (event) => {
  const series = seriesOf(current);
  const { left, width } = $("chart").getBoundingClientRect();
  const part = ((event.clientX - left) / width - 0.012) / 0.976;
  choose(series[Math.min(Math.max(Math.round(part * (series.length - 1)), 0), series.length - 1)]);
});
$("card-link").addEventListener("click", () => {
  $("card").open = true;
  $("card").querySelector("summary").focus();
});
$("save-csv").addEventListener("click", () => save("chestct.csv", "text/csv", csvOf(results.sorted())));
$("save-json").addEventListener("click", () => save("chestct.json", "application/json", JSON.stringify(records(results.sorted()), null, 2) + "\n"));
$("clear").addEventListener("click", () => {
  visit.abort();
  visit = new AbortController();
  queue.length = 0;
  results.items = [];
  results.render();
  current = null;
  view.isLabelChosen = false;
  document.body.classList.remove("has-scans", "has-choice");
  for (const id of ["results", "answer", "look"]) $(id).hidden = true;
  $("announce").textContent = "All scans are cleared.";
  $("files").focus();
});
$("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = theme === "dark" ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", `${$("theme").textContent} colours`);
  localStorage.setItem("chestct-theme", theme);
}
setTheme(localStorage.getItem("chestct-theme") === "light" ? "light" : "dark");

/* Files */

$("files").addEventListener("change", () => {
  add([...$("files").files].map((file) => [file, file.name]));
  $("files").value = "";
});
$("sample").addEventListener("click", async () => {
  const response = await fetch("/static/phantom.dcm");
  if (response.ok) add([[new File([await response.blob()], "phantom.dcm"), "phantom.dcm"]]);
});
let depth = 0;
addEventListener("dragenter", (event) => {
  event.preventDefault();
  depth++;
  document.body.classList.add("over");
});
addEventListener("dragleave", () => {
  if (--depth <= 0) document.body.classList.remove("over");
});
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", async (event) => {
  event.preventDefault();
  depth = 0;
  document.body.classList.remove("over");
  const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  const plain = [...event.dataTransfer.files].map((file) => [file, file.name]);
  add(entries.length ? (await Promise.all(entries.map(filesOf))).flat() : plain);
});

/** The files under a dropped file or folder, sorted by name. */
async function filesOf(entry) {
  if (entry.isFile) {
    const file = await new Promise((done, failed) => entry.file(done, failed));
    return [[file, entry.fullPath.slice(1)]];
  }
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    const some = await new Promise((done, failed) => reader.readEntries(done, failed));
    if (!some.length) break;
    found.push(...some.filter((child) => !child.name.startsWith(".")));
  }
  found.sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true }));
  return (await Promise.all(found.map(filesOf))).flat();
}

document.addEventListener("visibilitychange", () => document.hidden || look());
look();
