"use strict";
// All texts of the data are hostile: they reach the page as text nodes and attributes only.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { steps, clips, pairs, groups } = data;
  const byId = (id) => document.getElementById(id);
  const still = matchMedia("(prefers-reduced-motion: reduce)");

  // ---- Texts and numbers

  const INVISIBLE = /([\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}])/u;
  const code = (character) => "U+" + character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");

  function el(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  /** Nodes of a text; characters that show nothing, or that turn the text around, stand as their number. */
  function visible(text) {
    return text.split(INVISIBLE).map((part, i) => (i % 2 ? el("span", { class: "code" }, code(part)) : part));
  }

  const plain = (text) => text.split(INVISIBLE).map((part, i) => (i % 2 ? code(part) : part)).join("");
  const LONGEST = 300;
  function shortened(text) {
    const characters = text.length > LONGEST ? Array.from(text) : text;
    return characters.length > LONGEST ? characters.slice(0, LONGEST).join("") + `… (${count(characters.length)} characters)` : text;
  }
  const bdi = (text, kind = "id") => el("bdi", { class: kind }, ...visible(shortened(text)));

  const count = (n) => n.toLocaleString("en");
  const share = (part, whole) => (whole ? ((100 * part) / whole).toFixed(1) + " %" : "–");
  const score = (value) => (value === null ? "–" : value.toFixed(4));
  function size(bytes) {
    const units = ["bytes", "kB", "MB", "GB", "TB", "PB", "EB", "ZB"];
    let i = 0;
    while (bytes >= 999.5 && i < units.length - 1) [bytes, i] = [bytes / 1000, i + 1];
    return (i && bytes < 99.5 ? bytes.toFixed(1) : count(Math.round(bytes))) + " " + units[i];
  }
  function playing(seconds) {
    const [value, unit] = seconds < 59.95 ? [seconds, "s"] : seconds < 3597 ? [seconds / 60, "min"] : [seconds / 3600, "h"];
    return (value && value < 99.95 ? value.toFixed(1) : count(Math.round(value))) + " " + unit;
  }

  function table(caption, columns, rows) {
    const head = el("tr", {}, ...columns.map(([name, kind]) => el("th", { scope: "col", class: kind }, name)));
    const body = el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((cell, i) =>
      el(i ? "td" : "th", i ? { class: columns[i][1] } : { scope: "row", class: columns[i][1] }, cell)))));
    const whole = el("table", {}, el("thead", {}, head), body);
    return el("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": caption }, whole);
  }

  // ---- The threshold

  const nearest = (eps) => steps.reduce((best, step, i) => (Math.abs(step.eps - eps) < Math.abs(steps[best].eps - eps) ? i : best), 0);
  const inForce = data.eps === null ? -1 : steps.findIndex((step) => step.eps === data.eps);
  const start = nearest(data.eps ?? data.start_eps);
  const atMost = (step) => (step.exact ? "" : "at most");
  let now = start;

  const slider = byId("slider"), field = byId("eps"), back = byId("back");
  slider.max = Math.max(0, steps.length - 1);
  field.max = steps.length ? steps[steps.length - 1].eps : 1;

  const tiles = {};
  function addTile(name, label) {
    const number = el("span", { id: "n-" + name }), note = el("small", { id: "note-" + name });
    byId("tiles").append(el("div", {}, el("dt", {}, label), el("dd", {}, number, note)));
    tiles[name] = (text, below) => { number.textContent = text; note.textContent = below; };
  }
  addTile("duplicates", "Duplicates");
  addTile("share", "Share of compared rows");
  addTile("kept", "Kept rows");
  if (data.size_column !== null) addTile("bytes", "Bytes saved");
  if (data.duration_column !== null) addTile("hours", "Playing time saved");

  function showNumbers() {
    const step = steps[now], bound = atMost(step), n = data.n_compared;
    tiles.duplicates(count(step.duplicates), bound);
    tiles.share(share(step.duplicates, n), bound);
    tiles.kept(count(n - step.duplicates), step.exact ? "" : "at least");
    const column = (name, whole) => [bound, whole && `of ${whole}`, `by ${plain(name)}`].filter(Boolean).join(" · ");
    if (tiles.bytes) tiles.bytes(step.bytes === null ? "–" : size(step.bytes), column(data.size_column, data.total_bytes !== null && size(data.total_bytes)));
    if (tiles.hours) tiles.hours(step.seconds === null ? "–" : playing(step.seconds), column(data.duration_column, data.total_seconds !== null && playing(data.total_seconds)));
    byId("bar-duplicates").replaceChildren(bound ? bound + " " : "", el("strong", {}, count(step.duplicates)), ` removed (${share(step.duplicates, n)})`);
    slider.value = now;
    if (document.activeElement !== field) field.value = step.eps;
    slider.setAttribute("aria-valuetext", `eps ${step.eps}, ${bound} ${count(step.duplicates)} duplicates`.replace("  ", " "));
    back.hidden = now === start;
    byId("apply").replaceChildren(...visible(command()));
    if (data.apply_media) byId("apply-media").replaceChildren(...visible(commandOfMedia()));
  }
  const command = () => `${data.apply} --eps ${steps[now].eps}`;
  const commandOfMedia = () => `${data.apply_media} --eps ${steps[now].eps}`;

  function showForce() {
    back.textContent = data.eps === null ? `Back to ${steps[start].eps}` : `Back to eps in force, ${data.eps}`;
    if (data.eps !== null) {
      byId("force").hidden = false;
      byId("force").replaceChildren("In force in this run: ", el("strong", {}, `eps ${data.eps}`), `. It removes exactly ${count(data.n_duplicates)} rows (${share(data.n_duplicates, data.n_compared)}) and keeps ${count(data.n_kept)}.`);
    }
    const some = steps.some((step) => !step.exact);
    byId("explain").textContent = [
      data.eps === null ? "This run had no eps: nothing is removed yet." : "",
      some ? "“At most”: counts every row that has a better-ranked row within eps; it stays if all of those are removed themselves, and only a run with that eps tells." : "",
      data.n_rejected ? `${count(data.n_rejected)} rows could not be judged and are not counted here.` : "",
    ].filter(Boolean).join(" ");
  }

  function showTicks() {
    const ticks = byId("ticks"), last = steps.length - 1, width = ticks.clientWidth;
    ticks.replaceChildren();
    let free = -Infinity;
    const marked = steps.map((step, i) => [step, i]).filter(([step, i]) => i === inForce || data.grid.some((eps) => Math.abs(eps - step.eps) < 1e-12));
    const place = (i) => (last ? i / last : 0.5);
    const force = inForce < 0 ? null : place(inForce) * width;
    for (const [step, i] of marked) {
      const text = String(step.eps), half = 3.4 * text.length + 3, x = place(i) * width;
      const crowded = x - half < free || (force !== null && i !== inForce && Math.abs(x - force) < half + 22);
      if (!crowded || i === inForce) free = x + half;
      const tick = el("span", i === inForce ? { class: "force" } : {}, crowded && i !== inForce ? "" : text);
      tick.style.left = 100 * place(i) + "%";
      ticks.append(tick);
    }
  }

  let later = 0, speak = 0;
  function set(index) {
    const i = Math.min(Math.max(index, 0), steps.length - 1);
    if (i === now) return;
    now = i;
    showNumbers();
    showLines();
    followers.forEach((follow) => follow());
    clearTimeout(later);
    later = setTimeout(showPairs, 80);
    clearTimeout(speak);
    speak = setTimeout(() => {
      const step = steps[now];
      byId("live").textContent = `eps ${step.eps}: ${atMost(step)} ${count(step.duplicates)} duplicates, ${share(step.duplicates, data.n_compared)}; ${count(data.n_compared - step.duplicates)} rows kept.`;
    }, 500);
  }
  slider.addEventListener("input", () => set(Number(slider.value)));
  field.addEventListener("input", () => { if (field.value !== "" && Number.isFinite(field.valueAsNumber)) set(nearest(field.valueAsNumber)); });
  field.addEventListener("change", () => { field.value = steps[now].eps; });
  field.addEventListener("keydown", (event) => {
    const by = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (by) { event.preventDefault(); set(now + by); field.value = steps[now].eps; }
  });
  back.addEventListener("click", () => { set(start); slider.focus(); });

  // ---- Clips and pairs

  function picture(clip) {
    const { uri, frames, width, height } = clip.strip;
    const moving = frames > 1;
    const label = (moving ? "Frames of " : "Picture of ") + plain(shortened(clip.id));
    const made = el(moving ? "button" : "div", { class: "strip", "aria-label": label, ...(moving ? { type: "button" } : { role: "img" }) });
    if (/^data:image\/[a-z+]+[;,]/.test(uri)) made.style.backgroundImage = `url("${uri.replace(/["\\\s]/g, "")}")`;
    made.style.backgroundSize = `${100 * frames}% 100%`;
    made.style.setProperty("--ratio", `${width} / ${height}`);
    if (moving) {
      made.style.setProperty("--frames", frames);
      let frame = 0;
      made.addEventListener("click", () => {
        if (!still.matches) { made.classList.toggle("playing"); return; }
        frame = (frame + 1) % frames;
        made.style.backgroundPosition = `${(100 * frame) / (frames - 1)}% 0`;
      });
    }
    return made;
  }

  function clipView(index, role, other) {
    const clip = clips[index];
    const made = el("div", { class: "clip" }, el("p", { class: "role" }, role), bdi(clip.id));
    if (clip.strip) made.append(picture(clip));
    else if (clip.problem) made.append(el("p", { class: "problem" }, ...visible(clip.problem)));
    if (clip.columns.length) {
      const others = other === undefined ? null : new Map(clips[other].columns);
      made.append(el("dl", { class: "columns" }, ...clip.columns.flatMap(([name, value]) => {
        const beside = others?.get(name) ?? "";
        const long = Math.max(name.length, value.length, beside.length) > 18 ? "long " : "";
        const differs = others && others.get(name) !== value ? "differs" : "";
        return [el("dt", { class: long }, bdi(name, "name")), el("dd", { class: long + differs }, bdi(value, "value"))];
      })));
    }
    return made;
  }

  const cards = new Map();
  const LABELS = ["same", "different", "unsure"];
  const KEYS = { 1: 0, s: 0, 2: 1, d: 1, 3: 2, u: 2 };

  function card(index) {
    if (cards.has(index)) return cards.get(index);
    const pair = pairs[index], key = keyOf(pair);
    const header = el("header", {}, el("span", { class: "score" }, score(pair.score)));
    const centroids = [clips[pair.row].centroid, clips[pair.other].centroid];
    header.append(el("span", {}, centroids[0] === centroids[1] ? `cluster ${count(centroids[0])}` : `clusters ${centroids.map(count).join(" and ")}`));
    if (data.eps !== null) header.append(el("span", {}, pair.removed ? `removed at eps ${data.eps}` : `kept at eps ${data.eps}`));
    if (pair.reason) header.append(el("span", {}, "the other ranks first, ", el("bdi", {}, ...visible(pair.reason))));
    const made = el("article", { class: "pair", "aria-label": `Pair of similarity ${score(pair.score)}`, "data-pair": index }, header,
      el("div", { class: "two" }, clipView(pair.row, pair.removed ? "duplicate" : "row", pair.other),
        clipView(pair.other, pair.removed ? "witness, kept" : "better-ranked row", pair.row)));
    const choices = el("fieldset", { class: "marks" }, el("legend", { class: "hidden" }, `Are they the same? Pair of similarity ${score(pair.score)}`));
    const radios = LABELS.map((label) => {
      const radio = el("input", { type: "radio", name: `pair-${index}`, value: label });
      radio.checked = marks.get(key)?.label === label;
      radio.addEventListener("change", () => mark(pair, label));
      choices.append(el("label", {}, radio, label));
      return radio;
    });
    const next = el("button", { type: "button", "aria-label": "Next pair to judge" }, "next");
    next.addEventListener("click", nextPair);
    choices.append(next);
    made.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.altKey || event.metaKey) return;
      const pressed = event.key.toLowerCase();
      if (pressed === "n") { event.preventDefault(); nextPair(); return; }
      const radio = Object.hasOwn(KEYS, pressed) ? radios[KEYS[pressed]] : undefined;
      if (!radio) return;
      event.preventDefault();
      radio.checked = true;
      radio.focus();
      mark(pair, radio.value);
    });
    made.append(choices);
    cards.set(index, made);
    return made;
  }

  const line = () => Math.fround(1 - steps[now].eps);
  const PAGE = 6;
  const sides = {
    above: { box: byId("above"), more: byId("above-more"), note: byId("above-note"), shown: PAGE, all: [] },
    below: { box: byId("below-cards"), more: byId("below-more"), note: byId("below-note"), shown: PAGE, all: [] },
  };

  function showPairs() {
    const at = line(), order = pairs.map((_, i) => i);
    // Nearest to the line first.
    sides.above.all = order.filter((i) => Math.fround(pairs[i].score) >= at).sort((a, b) => pairs[a].score - pairs[b].score || a - b);
    sides.below.all = order.filter((i) => Math.fround(pairs[i].score) < at).sort((a, b) => pairs[b].score - pairs[a].score || a - b);
    sides.above.shown = sides.below.shown = PAGE;
    showSides();
  }
  function showSides() {
    for (const side of Object.values(sides)) {
      const shown = side.all.slice(0, side.shown).map(card), there = Array.from(side.box.children);
      // What is there already stays: it may have the focus.
      if (there.length && there.length <= shown.length && there.every((made, i) => made === shown[i])) side.box.append(...shown.slice(there.length));
      else side.box.replaceChildren(...(shown.length ? shown : [el("p", { class: "empty" }, "There are none.")]));
      side.more.hidden = side.shown >= side.all.length;
      side.note.textContent = `Similarity ${side === sides.above ? "at least" : "below"} ${line().toFixed(4)}, nearest to the line first: ${count(Math.min(side.shown, side.all.length))} of ${count(side.all.length)} sampled pairs.`;
    }
  }
  for (const side of Object.values(sides)) side.more.addEventListener("click", () => {
    const first = side.shown;
    side.shown += PAGE;
    showSides();
    side.box.children[first]?.querySelector("input").focus();
  });

  // ---- Marks

  const keyOf = (pair) => JSON.stringify([clips[pair.row].id, clips[pair.other].id]);
  const STORE = `untwin marks ${data.output} ${data.finished}`;
  const marks = new Map();
  try {
    for (const [key, value] of Object.entries(JSON.parse(localStorage.getItem(STORE) ?? "{}"))) {
      if (LABELS.includes(value?.label)) marks.set(key, value);
    }
  } catch { /* Storage may be denied to a page from disk, or hold something else. */ }

  function mark(pair, label) {
    marks.set(keyOf(pair), { id: clips[pair.row].id, other: clips[pair.other].id, score: pair.score, label, atLeast: pair.pairs_at_least });
    try { localStorage.setItem(STORE, JSON.stringify(Object.fromEntries(marks))); } catch { /* The marks stay in memory. */ }
    showMarks();
  }
  function showMarks() {
    const of = LABELS.map((label) => Array.from(marks.values()).filter((value) => value.label === label).length);
    byId("marks").textContent = `${of[0]} same, ${of[1]} different, ${of[2]} unsure`;
    byId("download").disabled = of[0] + of[1] === 0;
  }
  function nextPair() {
    const eps = 1 - steps[now].eps;
    clearTimeout(later);
    showPairsIfStale();
    const order = pairs.map((_, i) => i).sort((a, b) => Math.abs(pairs[a].score - eps) - Math.abs(pairs[b].score - eps) || a - b);
    const found = order.find((i) => !marks.has(keyOf(pairs[i])));
    if (found === undefined) { say(pairs.length ? "All pairs of this page are marked." : "There are no pairs to judge."); return; }
    for (const side of Object.values(sides)) {
      const position = side.all.indexOf(found);
      while (position >= side.shown) side.shown += PAGE;
    }
    showSides();
    const made = card(found);
    made.querySelector("input").focus({ preventScroll: true });
    made.scrollIntoView({ block: "center", behavior: still.matches ? "auto" : "smooth" });
  }
  function showPairsIfStale() {
    const at = line(), all = sides.above.all;
    if (all.length !== pairs.filter((pair) => Math.fround(pair.score) >= at).length) showPairs();
  }
  byId("next").addEventListener("click", nextPair);

  const quoted = (text) => (/[",\r\n]/.test(text) || text !== text.trim() ? `"${text.replaceAll('"', '""')}"` : text);
  function labels() {
    const rows = Array.from(marks.values()).filter((value) => value.label !== "unsure").map((value) =>
      [quoted(value.id), quoted(value.other), value.score.toPrecision(9), value.label, value.atLeast].join(","));
    return ["id,other_id,cosine_sim_score,label,pairs_at_least", ...rows, ""].join("\r\n");
  }
  byId("download").addEventListener("click", () => {
    const url = URL.createObjectURL(new Blob([labels()], { type: "text/csv;charset=utf-8" }));
    el("a", { href: url, download: "labels.csv" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
    say("labels.csv is downloaded.");
  });

  // ---- Copying

  function say(text) { byId("said").textContent = ""; byId("said").textContent = text; }
  async function copy(text) {
    try { await navigator.clipboard.writeText(text); return true; } catch { /* A page from disk may have no clipboard. */ }
    const area = el("textarea", { "aria-label": "Command", class: "hidden" });
    area.value = text;
    document.body.append(area);
    area.select();
    try { return document.execCommand("copy"); } catch { return false; } finally { area.remove(); }
  }
  function copies(id, text) {
    const button = byId(id), name = button.textContent;
    button.addEventListener("click", async () => {
      const done = await copy(text());
      button.focus();
      button.textContent = done ? "Copied" : "Not copied: select the text";
      say(button.textContent);
      setTimeout(() => { button.textContent = name; }, 2500);
    });
  }
  copies("apply-copy", command);
  if (data.apply_media) copies("apply-media-copy", commandOfMedia);
  copies("reproduce-copy", () => data.reproduce);

  // ---- Groups

  let groupsShown = 0;
  function moreGroups() {
    const few = 6, first = groupsShown;
    for (const group of groups.slice(first, first + few)) {
      const left = group.n_duplicates - group.shown.length;
      const members = group.shown.map(([index, value]) => el("li", {}, el("span", { class: "number" }, score(value)), clipView(index, "duplicate")));
      if (left > 0) members.push(el("li", {}, el("span"), `and ${count(left)} more`));
      const name = `${count(group.n_duplicates)} duplicates of one row`;
      byId("groups").append(el("article", { class: "group" }, el("h3", {}, name), clipView(group.kept, "kept"),
        el("ul", { tabindex: "0", "aria-label": name }, ...members)));
    }
    groupsShown = Math.min(groups.length, first + few);
    byId("groups-more").hidden = groupsShown >= groups.length;
    byId("groups-note").textContent = groups.length
      ? `A group is a kept row and the duplicates that have it as witness. Shown: ${count(groupsShown)} of ${count(data.n_groups)}, by size, at eps ${data.eps}.`
      : data.eps === null ? "A run without eps has no groups." : "There are no duplicates, so there are no groups.";
    if (first) byId("groups").children[first]?.querySelector("ul").focus();
  }
  byId("groups-more").addEventListener("click", moreGroups);

  // ---- Where

  const followers = [];
  function whereTable(box, caption, first, rows) {
    const columns = [[first, ""], ["rows", "n"], ["duplicates", "n"], ["share", "share"]];
    const removed = data.eps !== null && rows.some((row) => row.removed !== undefined && row.removed !== null);
    if (removed) columns.push([`removed at ${data.eps}`, "n"]);
    const cells = rows.map((row) => {
      const bar = el("i"), text = el("span");
      return { row, number: el("span"), bar, text, share: el("span", {}, bar, text) };
    });
    const whole = table(caption, columns, cells.map((cell) => [cell.row.name, count(cell.row.rows), cell.number, cell.share,
      ...(removed ? [cell.row.removed === null ? "–" : count(cell.row.removed)] : [])]));
    const head = whole.querySelectorAll("thead th")[2];
    followers.push(() => {
      head.textContent = (steps[now].exact ? "" : "at most ") + "duplicates";
      const highest = Math.max(0, ...cells.map((cell) => (cell.row.rows ? cell.row.duplicates[now] / cell.row.rows : 0)));
      for (const cell of cells) {
        const n = cell.row.duplicates[now];
        cell.number.textContent = count(n);
        cell.text.textContent = share(n, cell.row.rows);
        cell.bar.style.setProperty("--share", highest && cell.row.rows ? n / cell.row.rows / highest : 0);
      }
    });
    byId(box).append(whole);
  }
  if (data.source_column !== null) {
    byId("sources-part").hidden = false;
    whereTable("sources", "Duplicates by value", "value", data.sources.map((source) => ({ ...source,
      name: source.value === null ? "all others" : source.value === "" ? "(empty)" : bdi(source.value, "value") })));
  }
  if (data.clusters.length) whereTable("clusters", "Duplicates by cluster", "cluster", data.clusters.map((cluster) => ({ ...cluster, name: count(cluster.centroid) })));
  else byId("clusters").append(el("p", { class: "muted" }, "No cluster has duplicates."));

  // ---- Tables beside the charts

  const edges = data.bin_edges, counts = data.bin_counts;
  const digits = edges.length > 1 ? Math.min(8, Math.max(2, Math.ceil(-Math.log10((edges[edges.length - 1] - edges[0]) / counts.length)) + 1)) : 2;
  const between = (i) => `${edges[i].toFixed(digits)} to ${edges[i + 1].toFixed(digits)}`;
  byId("below").textContent = data.n_below ? `Not in the chart: ${count(data.n_below)} rows (${share(data.n_below, data.n_compared)}) that are less similar than ${edges.length ? edges[0].toFixed(digits) : "all of it"}.` : "";
  byId("histogram-table").append(table("Rows by similarity", [["similarity", ""], ["rows", "n"]], counts.map((n, i) => [between(i), count(n)]).reverse()));
  const stepsTable = table("Positions of the slider", [["eps", "n"], ["duplicates", "n"], ["share", "n"], ["", ""]],
    steps.map((step, i) => [String(step.eps), count(step.duplicates), share(step.duplicates, data.n_compared), [atMost(step), i === inForce ? "in force" : ""].filter(Boolean).join(", ")]));
  stepsTable.querySelector("thead th:last-child").append(el("span", { class: "hidden" }, "remark"));
  byId("curve-table").append(stepsTable);
  const stepRows = stepsTable.querySelectorAll("tbody tr");
  followers.push(() => {
    stepsTable.querySelector(".now")?.classList.remove("now");
    stepRows[now].classList.add("now");
  });
  const sizes = data.cluster_sizes;
  const place = (i) => (sizes.length > 1 ? 1 + Math.round((i * (data.n_clusters - 1)) / (sizes.length - 1)) : 1);
  byId("sizes-table").append(table("Sizes of clusters", [["place by size", "n"], ["rows", "n"]], sizes.map((n, i) => [count(place(i)), count(n)])));

  // ---- Charts; they come after the page has been painted

  const MARGIN = { l: 64, r: 16, t: 28, b: 48 };
  const lines = [];
  const probe = el("span", { class: "hidden" });
  document.body.append(probe);
  function colour(name) {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  }

  /** Puts a line on a chart that moves the slider; `at` gives the line's place in [0, 1] for an eps, `eps` the way back. */
  function addLine(chart, at, eps) {
    const box = byId(chart), removed = el("div", { class: "removed" }), label = el("span");
    const handle = el("div", { class: "handle", "aria-hidden": "true" }, label);
    const move = (event) => {
      const { left, width } = box.getBoundingClientRect();
      const x = (event.clientX - left - MARGIN.l) / (width - MARGIN.l - MARGIN.r);
      set(nearest(eps(Math.min(1, Math.max(0, x)))));
    };
    handle.addEventListener("pointerdown", (event) => { handle.setPointerCapture(event.pointerId); event.preventDefault(); });
    handle.addEventListener("pointermove", (event) => { if (handle.hasPointerCapture(event.pointerId)) move(event); });
    box.append(removed, handle);
    for (const part of [removed, handle]) { part.style.top = MARGIN.t + "px"; part.style.bottom = MARGIN.b + "px"; }
    removed.style.left = MARGIN.l + "px";
    lines.push(() => {
      const x = Math.min(1, Math.max(0, at(steps[now].eps)));
      const width = `calc((100% - ${MARGIN.l + MARGIN.r}px) * ${x})`;
      handle.style.left = `calc(${MARGIN.l}px + (100% - ${MARGIN.l + MARGIN.r}px) * ${x})`;
      removed.style.width = width;
      label.textContent = `eps ${steps[now].eps}`;
      label.style.transform = `translateX(${-100 * x}%)`;
    });
  }
  function showLines() { lines.forEach((show) => show()); }

  const logOf = (id) => byId(id).checked;
  function uneven(numbers) {
    const some = numbers.filter((n) => n > 0).sort((a, b) => a - b);
    return some.length > 0 && some[some.length - 1] > 50 * some[Math.floor(some.length / 2)];
  }
  byId("histogram-log").checked = uneven(counts);
  const last = edges.length - 1, widest = steps.length ? steps[steps.length - 1].eps : 1;

  function drawCharts() {
    const text = colour("text"), grid = colour("line"), bar = colour("bar"), gone = colour("gone"), panel = colour("panel");
    const axis = (title, more) => ({ title: { text: title, standoff: 8 }, fixedrange: true, gridcolor: grid, linecolor: grid, zerolinecolor: grid, ...more });
    const draw = (id, label, traces, xaxis, yaxis) => {
      byId(id).setAttribute("role", "img");
      byId(id).setAttribute("aria-label", label + "; the table below has the same numbers");
      return window.Plotly.react(id, traces, {
        margin: MARGIN, showlegend: false, dragmode: false, bargap: 0.05, hovermode: "closest", autosize: true,
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { family: "system-ui, sans-serif", size: 12, color: text }, hoverlabel: { bgcolor: panel, bordercolor: text, font: { color: text } },
        xaxis, yaxis,
      }, { displayModeBar: false, responsive: true, doubleClick: false, scrollZoom: false });
    };
    const scale = (log) => (log ? { type: "log", dtick: 1, exponentformat: "none", separatethousands: true } : { type: "linear", rangemode: "tozero", separatethousands: true, exponentformat: "none" });
    if (counts.length) draw("histogram", "Histogram of rows by similarity", [{
      type: "bar", x: counts.map((_, i) => (edges[i] + edges[i + 1]) / 2), width: counts.map((_, i) => edges[i + 1] - edges[i]), y: counts,
      marker: { color: bar }, hovertemplate: counts.map((n, i) => `similarity ${between(i)}<br>${count(n)} rows<extra></extra>`),
    }], axis("similarity (cosine)", { range: [edges[last], edges[0]] }), axis("rows", scale(logOf("histogram-log"))));
    const bounds = steps.some((step) => !step.exact);
    const hover = (step) => `eps ${step.eps}<br>${atMost(step)} ${count(step.duplicates)} rows, ${share(step.duplicates, data.n_compared)}<extra></extra>`;
    const curve = (some, more) => ({ type: "scatter", x: some.map((step) => step.eps), y: some.map((step) => data.n_compared ? (100 * step.duplicates) / data.n_compared : 0), hovertemplate: some.map(hover), ...more });
    const traces = [curve(bounds ? steps.filter((step) => !step.exact) : steps, { mode: steps.length > 60 ? "lines" : "lines+markers", line: { color: bar, width: 2 }, marker: { size: 5 } })];
    if (inForce >= 0) traces.push(curve([steps[inForce]], { mode: "markers", marker: { color: gone, size: 11, symbol: "diamond" } }));
    draw("curve", "Share of rows removed by eps", traces, axis("eps", { range: [0, widest] }), axis(bounds ? "share removed, at most (%)" : "share removed (%)", { rangemode: "tozero" }));
    if (sizes.length) draw("sizes", "Sizes of clusters, largest first", [{
      type: sizes.length > 60 ? "scatter" : "bar", mode: "lines", fill: "tozeroy", x: sizes.map((_, i) => place(i)), y: sizes, line: { color: bar, width: 2 }, marker: { color: bar },
      hovertemplate: sizes.map((n, i) => `place ${count(place(i))}<br>${count(n)} rows<extra></extra>`),
    }], axis("clusters, largest first", { separatethousands: true, exponentformat: "none" }), axis("rows", scale(uneven(sizes))));
    for (const waiting of document.querySelectorAll(".waiting")) waiting.remove();
    document.documentElement.dataset.charts = "drawn";
  }
  function redraw() { if (window.Plotly && steps.length) drawCharts(); }
  byId("histogram-log").addEventListener("change", redraw);

  function loadCharts() {
    const source = byId("plotly").textContent;
    byId("plotly").remove();
    const script = document.createElement("script");
    script.textContent = source;
    document.body.append(script);
    if (window.Plotly) redraw();
    else for (const waiting of document.querySelectorAll(".waiting")) waiting.textContent = "No chart here: see the table.";
  }

  // ---- Colours

  const scheme = byId("scheme");
  function useScheme(value) {
    if (value) document.documentElement.dataset.scheme = value;
    else delete document.documentElement.dataset.scheme;
    redraw();
  }
  try { scheme.value = localStorage.getItem("untwin scheme") ?? ""; } catch { /* As the system. */ }
  if (scheme.selectedIndex < 0) scheme.value = "";
  scheme.addEventListener("change", () => {
    try { localStorage.setItem("untwin scheme", scheme.value); } catch { /* For this time only. */ }
    useScheme(scheme.value);
  });
  useScheme(scheme.value);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  // ---- Start

  for (const chart of document.querySelectorAll(".chart")) chart.append(el("p", { class: "muted waiting" }, "The chart is being drawn."));
  if (counts.length) addLine("histogram", (eps) => (edges[last] - (1 - eps)) / (edges[last] - edges[0]), (x) => 1 - (edges[last] - x * (edges[last] - edges[0])));
  addLine("curve", (eps) => eps / widest, (x) => x * widest);
  if (steps.length) {
    showForce();
    showNumbers();
    showTicks();
    showLines();
    followers.forEach((follow) => follow());
    showPairs();
    addEventListener("resize", showTicks);
  }
  showMarks();
  moreGroups();
  const painted = () => requestAnimationFrame(() => setTimeout(loadCharts));
  if (document.readyState === "complete") painted();
  else addEventListener("load", painted);
})();
