// The list of scans of this visit: rows, sorting, and what can be saved of it.

export const outside = (item) => item.line?.status === "ok" && !item.line.in_domain;
export const probability = (item) => item.line?.probabilities?.[item.line.label];

const WAITS = { queued: "waiting", sending: "sending", held: "waiting for the server" };
const KEYS = {
  name: (item) => item.name,
  domain: (item) => (item.line?.status !== "ok" ? 2 : outside(item) ? 1 : 0),
  label: (item) => item.line?.label ?? "~",
  probability: (item) => probability(item) ?? -1,
};
const names = new Intl.Collator("en", { numeric: true });

export class Results {
  /** @param choose Called with the item whose row is chosen. */
  constructor(table, choose) {
    this.body = table.tBodies[0];
    this.heads = [...table.querySelectorAll("th")];
    this.choose = choose;
    this.items = [];
    this.chosen = null;
    this.sort = null; // {key, down}; null is the order in which the scans came
    this.rows = new Map();
    for (const head of this.heads) {
      const button = head.querySelector("button");
      button.addEventListener("click", () => this.#sortBy(button.dataset.sort));
    }
    this.body.addEventListener("click", (event) => {
      const row = event.target.closest("tr");
      if (row) this.choose(row.item);
    });
    this.body.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Items in the order of the rows. */
  sorted() {
    if (!this.sort) return this.items;
    const key = KEYS[this.sort.key];
    const sign = this.sort.down ? -1 : 1;
    const compare = (a, b) => (typeof a === "string" ? names.compare(a, b) : a - b);
    return [...this.items].sort((a, b) => sign * compare(key(a), key(b)));
  }

  render() {
    const wanted = this.sorted();
    for (const [item, row] of this.rows) {
      if (!this.items.includes(item)) {
        row.remove();
        this.rows.delete(item);
      }
    }
    wanted.forEach((item, i) => {
      const row = this.#row(item);
      if (this.body.rows[i] !== row) this.body.insertBefore(row, this.body.rows[i] ?? null);
    });
  }

  mark(item) {
    this.chosen = item;
    for (const [other, row] of this.rows) {
      row.classList.toggle("chosen", other === item);
      const button = row.querySelector("button");
      button.tabIndex = other === item ? 0 : -1;
      if (other === item) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    }
    this.rows.get(item)?.scrollIntoView({ block: "nearest" });
  }

  #row(item) {
    let row = this.rows.get(item);
    if (!row) {
      row = document.createElement("tr");
      row.item = item;
      const button = document.createElement("button");
      button.type = "button";
      button.tabIndex = this.rows.size ? -1 : 0;
      button.append(document.createElement("span"));
      const cells = [0, 1, 2, 3].map(() => row.insertCell());
      cells[0].append(button);
      cells[3].className = "number";
      this.rows.set(item, row);
    }
    const { line } = item;
    const [, domain, label, value] = row.cells;
    row.querySelector("button span").textContent = item.name.split(/[!/]/).at(-1);
    row.querySelector("button").title = item.name;
    const isOk = line?.status === "ok";
    const isRefused = line?.error?.type === "OutOfDomainError";
    domain.className = isOk ? (outside(item) ? "tag out" : "tag in") : line ? "tag bad" : "muted";
    domain.textContent = isOk ? (outside(item) ? "▲ out" : "in") : line ? (isRefused ? "✕ refused" : "✕ error") : "…";
    label.className = outside(item) ? "doubted" : "";
    label.textContent = isOk ? line.label : line ? "–" : WAITS[item.state];
    label.title = label.textContent;
    value.className = outside(item) ? "number doubted" : "number";
    value.textContent = isOk ? percent(probability(item)) : "";
    return row;
  }

  #sortBy(key) {
    const down = this.sort?.key === key ? !this.sort.down : key === "probability" || key === "domain";
    this.sort = { key, down };
    for (const head of this.heads) {
      const isKey = head.querySelector("button").dataset.sort === key;
      head.setAttribute("aria-sort", isKey ? (down ? "descending" : "ascending") : "none");
    }
    this.render();
  }

  #key(event) {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!by) return;
    const items = this.sorted();
    const next = items[items.indexOf(event.target.closest("tr").item) + by];
    event.preventDefault();
    if (next) {
      this.choose(next);
      this.rows.get(next).querySelector("button").focus();
    }
  }
}

/** Never 0 % or 100 %: no model is that sure. */
export function percent(value) {
  if (value >= 0.9995) return ">99.9%";
  if (value < 0.0005) return "<0.1%";
  return `${(100 * value).toFixed(1)}%`;
}

/** The records as the API gave them, without the pictures. */
export function records(items) {
  return items.filter((item) => item.line).map(({ line }) => {
    const { view, ...record } = line;
    return record;
  });
}

/** The same columns, flattened; texts that a spreadsheet might run begin with an apostrophe. */
export function csvOf(items) {
  const rows = records(items).map((record) => flat(record));
  const columns = [...new Set(rows.flatMap((row) => Object.keys(row)))];
  const cell = (value) => {
    let text = value === undefined ? "" : String(value);
    if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [columns, ...rows.map((row) => columns.map((column) => row[column]))]
    .map((row) => row.map(cell).join(",") + "\r\n")
    .join("");
}

function flat(record, prefix = "", row = {}) {
  for (const [key, value] of Object.entries(record)) {
    if (Array.isArray(value)) row[prefix + key] = value.join("; ");
    else if (typeof value === "object" && value) flat(value, `${prefix}${key}.`, row);
    else row[prefix + key] = value;
  }
  return row;
}

export function save(name, type, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
