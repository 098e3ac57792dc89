/* The ledger: search, filters and a summary of the verdicts.

   Everything is read from the tables of the page, which stay as they are without this script: the
   part of the book is the heading above a table, the experiment the line in bold above it, with a
   list of its scales below that, and every column after "Set" is a scale. The state of the filters stands in the address, so that a
   view can be linked: ledger.html#verdict=not-reproduced&source=Zhou */

(() => {
  "use strict";

  const VERDICTS = {
    reproduced: "✓",
    "not reproduced": "✗",
    inconclusive: "≈",
    "does not apply": "–",
    "not run": "…",
  };
  // The first of them in a cell is its verdict; a reason after it may hold another.
  const WORDS = /not reproduced|does not apply|not run|inconclusive|reproduced/;

  const make = (tag, attributes = {}, ...contents) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...contents);
    return element;
  };
  const clean = (text) => text.replace(/\s+/g, " ").trim();
  const slug = (text) =>
    clean(text)
      .toLowerCase()
      .replace(/[^\p{L}\p{N}]+/gu, "-")
      .replace(/^-|-$/g, "");
  const distinct = (values) => [...new Set(values)];
  const heading = (element) =>
    clean(
      [...element.childNodes]
        .filter((node) => !node.matches?.(".headerlink"))
        .map((node) => node.textContent)
        .join(""),
    );

  /* ── Reading the tables ─────────────────────────────────────────────────────────────────── */

  function emphasise(cell, verdict) {
    const texts = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
      const at = texts.currentNode.data.indexOf(verdict);
      if (at < 0) continue;
      const word = texts.currentNode.splitText(at);
      word.splitText(verdict.length);
      word.replaceWith(make("strong", {}, verdict));
      return;
    }
  }

  function readRow(tr, names, scales, part, experiment) {
    const row = { tr, part, experiment, cells: {} };
    tr.setAttribute("role", "row");
    [...tr.cells].forEach((cell, k) => {
      const name = names[k];
      const text = clean(cell.textContent);
      cell.setAttribute("role", "cell");
      cell.dataset.label = name;
      if (scales.includes(name)) {
        const verdict = text.match(WORDS)?.[0] ?? "not run";
        row.cells[name] = { cell, verdict };
        cell.dataset.verdict = slug(verdict);
        emphasise(cell, verdict);
      } else {
        row[name.toLowerCase()] = text;
      }
    });
    row.text = [experiment, row.statement, row.source].join(" ").toLowerCase();
    return row;
  }

  /* The rows in the order of the page, and what is empty when none of its rows is shown. */
  function read(article) {
    const rows = [];
    const groups = [];
    const lines = [];
    let part = null;
    let title = null;
    let lead = null;
    for (const element of article.querySelectorAll("h2, p, ul, table")) {
      if (element.matches("h2")) {
        part = { name: heading(element), section: element.closest("section"), rows: [] };
      } else if (element.matches("p")) {
        if (element.closest("table")) continue;
        const [only, ...more] = element.children;
        const bold = only?.matches("strong") && more.length === 0;
        if (bold && clean(only.textContent) === clean(element.textContent)) {
          title = element;
          lead = null;
        }
      } else if (element.matches("ul")) {
        if (!element.closest("table")) lead = element;
      } else {
        const names = [...element.querySelectorAll("thead th")].map((th) => clean(th.textContent));
        if (names[0] !== "Statement" || !names.includes("Set") || !part) continue;
        const scales = names.slice(names.indexOf("Set") + 1);
        const name = clean(title?.textContent ?? "");
        element.classList.add("ledger");
        // As cards the parts of a table lose the roles they have by themselves.
        element.setAttribute("role", "table");
        element.setAttribute("aria-label", name);
        element
          .querySelectorAll("thead, tbody")
          .forEach((group) => group.setAttribute("role", "rowgroup"));
        element.querySelectorAll("th").forEach((th) => th.setAttribute("role", "columnheader"));
        element.querySelector("thead tr").setAttribute("role", "row");
        const found = [...element.querySelectorAll("tbody tr")].map((tr) =>
          readRow(tr, names, scales, part.name, name),
        );
        rows.push(...found);
        // Title and table, each with the box that the notebook and the theme put around it.
        lead?.classList.add("ledger-scales");
        for (const li of lead?.children ?? [])
          lines.push({ li, scale: clean(li.querySelector("em")?.textContent ?? "") });
        groups.push({ rows: found, elements: [title, lead, element].filter(Boolean).map(outermost) });
        part.rows.push(...found);
        if (!groups.includes(part)) groups.push(Object.assign(part, { elements: [part.section] }));
      }
    }
    return { rows, groups, lines };
  }

  function outermost(element) {
    let box = element;
    while (
      box.parentElement.children.length === 1 &&
      !box.parentElement.matches("section, article, .cell")
    )
      box = box.parentElement;
    return box;
  }

  /* ── Filters ────────────────────────────────────────────────────────────────────────────── */

  function choice(name, label, options) {
    const id = `ledger-${name}`;
    const select = make("select", { id, name, autocomplete: "off" }, new Option("all", ""));
    for (const option of options) {
      if (option.group) {
        const group = make("optgroup", { label: option.group });
        group.append(...option.options.map((text) => new Option(text, slug(text))));
        select.append(group);
      } else {
        select.append(new Option(option, slug(option)));
      }
    }
    return { name, select, element: make("div", {}, make("label", { for: id }, label), select) };
  }

  /* A value from the address: that of an option, or part of one; for sources, of several. */
  function put(select, wanted) {
    select.querySelectorAll("option[data-made]").forEach((option) => option.remove());
    const value = slug(wanted);
    const values = [...select.options].map((option) => option.value);
    const near = values.filter((each) => value && each.includes(value));
    if (values.includes(value)) {
      select.value = value;
    } else if (select.name === "source" && near.length > 1) {
      const made = new Option(`with “${wanted}”`, value);
      made.dataset.made = "yes";
      select.append(made);
      select.value = value;
    } else {
      select.value = near[0] ?? "";
    }
  }

  function start(article) {
    const { rows, groups, lines } = read(article);
    if (rows.length === 0) return;
    // In the order of the table that has most of them.
    const columns = rows.map((row) => Object.keys(row.cells)).sort((a, b) => b.length - a.length);
    const scales = distinct(columns.flat());
    const parts = distinct(rows.map((row) => row.part)).map((part) => {
      const experiments = rows.filter((row) => row.part === part).map((row) => row.experiment);
      return { group: part, options: [part, ...distinct(experiments)] };
    });
    const verdicts = Object.keys(VERDICTS).filter((verdict) =>
      rows.some((row) => Object.values(row.cells).some((cell) => cell.verdict === verdict)),
    );

    const search = make("input", {
      id: "ledger-search",
      name: "search",
      type: "search",
      autocomplete: "off",
    });
    const filters = [
      choice("part", "Part or experiment", parts),
      choice("source", "Source", distinct(rows.map((row) => row.source)).sort()),
      choice("kind", "Kind", distinct(rows.map((row) => row.kind))),
      choice("set", "Criterion set", distinct(rows.map((row) => row.set))),
      choice("scale", "Scale", scales),
      choice("verdict", "Verdict", verdicts),
    ];
    const reset = make("button", { type: "reset" }, "Show all");
    const count = make("p", { role: "status", class: "ledger-count" });
    const bars = make("div", { class: "ledger-bars" });
    const form = make(
      "form",
      { class: "ledger-controls", role: "search", "aria-label": "Claims of the ledger" },
      make(
        "div",
        { class: "ledger-search" },
        make("label", { for: "ledger-search" }, "Search"),
        search,
      ),
      make("div", { class: "ledger-filters" }, ...filters.map((filter) => filter.element)),
      make("div", { class: "ledger-foot" }, count, reset),
      bars,
    );
    rows[0].tr.closest("table").closest("section").before(form);

    const state = () => {
      const fields = [search, ...filters.map((filter) => filter.select)];
      return Object.fromEntries(fields.map((field) => [field.name, field.value.trim()]));
    };

    const sources = distinct(rows.map((row) => slug(row.source)));

    function matches(row, wanted, words) {
      const is = (name, value) => !wanted[name] || wanted[name] === slug(value);
      const at = scales.filter((scale) => row.cells[scale] && is("scale", scale));
      return (
        words.every((word) => row.text.includes(word)) &&
        (is("part", row.part) || is("part", row.experiment)) &&
        (sources.includes(wanted.source)
          ? is("source", row.source)
          : slug(row.source).includes(wanted.source)) &&
        is("kind", row.kind) &&
        is("set", row.set) &&
        at.some((scale) => is("verdict", row.cells[scale].verdict))
      );
    }

    function bar(scale, shown) {
      const found = shown.map((row) => row.cells[scale]?.verdict).filter(Boolean);
      if (found.length === 0) return "";
      const counts = Object.keys(VERDICTS)
        .map((verdict) => [verdict, found.filter((each) => each === verdict).length])
        .filter(([, n]) => n > 0);
      const strip = make("div", { class: "ledger-strip", "aria-hidden": "true" });
      const list = make("ul");
      for (const [verdict, n] of counts) {
        const attributes = { "data-verdict": slug(verdict), style: `flex-grow:${n}` };
        strip.append(make("span", attributes, n / found.length > 0.06 ? VERDICTS[verdict] : ""));
        const sign = make("span", { "aria-hidden": "true" }, `${VERDICTS[verdict]} `);
        list.append(make("li", {}, sign, `${n} ${verdict}`));
      }
      return make("div", {}, make("h3", {}, scale), strip, list);
    }

    function show() {
      const wanted = state();
      const words = wanted.search.toLowerCase().split(/\s+/).filter(Boolean);
      const shown = rows.filter((row) => matches(row, wanted, words));
      for (const row of rows) {
        row.tr.hidden = !shown.includes(row);
        for (const [scale, { cell }] of Object.entries(row.cells))
          cell.hidden = Boolean(wanted.scale) && slug(scale) !== wanted.scale;
      }
      for (const { li, scale } of lines)
        li.hidden = Boolean(wanted.scale) && slug(scale) !== wanted.scale;
      for (const group of groups) {
        const empty = group.rows.every((row) => row.tr.hidden);
        group.elements.forEach((element) => (element.hidden = empty));
      }
      count.textContent =
        shown.length === 0
          ? `No claim of ${rows.length} matches.`
          : `${shown.length} of ${rows.length} claims`;
      const visible = scales.filter((scale) => !wanted.scale || slug(scale) === wanted.scale);
      bars.replaceChildren(...visible.map((scale) => bar(scale, shown)));
      reset.disabled = Object.values(wanted).every((value) => value === "");
    }

    function fromAddress() {
      if (location.hash && !location.hash.includes("=")) return; // an anchor of the page
      const given = new URLSearchParams(location.hash.slice(1));
      search.value = given.get("search") ?? "";
      filters.forEach(({ name, select }) => put(select, given.get(name) ?? ""));
      show();
    }

    function toAddress() {
      const wanted = Object.entries(state()).filter(([, value]) => value !== "");
      const hash = wanted.length ? `#${new URLSearchParams(wanted)}` : "";
      history.replaceState(null, "", location.pathname + location.search + hash);
    }

    let waiting = 0;
    const changed = () => {
      show();
      toAddress();
    };
    search.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(changed, 150);
    });
    filters.forEach(({ select }) => select.addEventListener("change", changed));
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(changed));
    addEventListener("hashchange", fromAddress);

    show();
    fromAddress();
  }

  const startAll = () => {
    const article = document.querySelector("article.bd-article");
    if (article) start(article);
  };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", startAll);
  else startAll();
})();
