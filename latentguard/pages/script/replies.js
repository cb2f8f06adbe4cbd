// Replies side by side: which prompts are found, one page of them, and the view as a link.

const PAGE = 25;
const MOST_COLUMNS = 4;
const DIFFERS = "\u0000differs";

/** What was said, by prompt and condition: the places in `said`. */
const placed = ({ said, conditions }) => {
  const places = new Map();
  said.prompt.forEach((prompt, at) => places.set(prompt * conditions.length + said.condition[at], at));
  return (prompt, condition) => places.get(prompt * conditions.length + condition);
};

const searchFor = (words) => (words ? new RegExp(words.replace(/[\\^$.*+?()[\]{}|/-]/g, "\\$&"), "giu") : null);

/** The prompts that have something in the columns shown, and of these the ones that fit the filters. */
const found = (data, at, state) => {
  const { prompts, said, texts, verdicts } = data;
  const asked = [];
  const fitting = [];
  const search = searchFor(state.words);
  const has = (text) => text >= 0 && texts[text].search(search) >= 0;
  prompts.id.forEach((id, prompt) => {
    const cells = state.columns.map((column) => at(prompt, column)).filter((cell) => cell !== undefined);
    if (!cells.length) return;
    asked.push(prompt);
    if (state.label && prompts.label[prompt] !== state.label) return;
    if (state.category && prompts.category[prompt] !== state.category) return;
    const given = cells.map((cell) => said.verdict[cell]);
    if (state.verdict === DIFFERS ? new Set(given).size < 2 : state.verdict && !given.some((one) => verdicts[one] === state.verdict)) return;
    if (search && !has(prompts.text[prompt]) && prompts.category[prompt].search(search) < 0 && !cells.some((cell) => has(said.text[cell]))) return;
    fitting.push(prompt);
  });
  return { asked, fitting };
};

/** A text with what was searched for marked. */
const marked = (text, search) => {
  if (!search) return [text];
  const parts = [];
  let from = 0;
  for (const hit of text.matchAll(search)) {
    parts.push(text.slice(from, hit.index), make("mark", {}, hit[0]));
    from = hit.index + hit[0].length;
  }
  return [...parts, text.slice(from)];
};

const pill = (data, verdict) => {
  const [mark, colour] = data.marks[verdict] ?? ["", ""];
  return make("span", { class: `chip pill ${colour}` }, mark ? make("span", { "aria-hidden": "true" }, `${mark} `) : null, verdict);
};

const LONG_TEXT = 700;
const spoken = (text, search) => {
  const long = text.length > LONG_TEXT ? { tabindex: "0", role: "group", "aria-label": "a long text, which scrolls" } : {};
  return make("p", { class: text.length > LONG_TEXT ? "words long" : "words", dir: "auto", ...long }, marked(text, search));
};

const missing = (data, text) => {
  const count = data.missing[text];
  return count ? make("p", { class: "soft" }, `… ${counted(count, "more character")} left out here; rows.jsonl has the whole text.`) : null;
};

const reply = (data, cell, search, folded, unfolded) => {
  const { said, texts, verdicts } = data;
  const [text, verdict, score] = [said.text[cell], said.verdict[cell], said.score[cell]];
  const judged = make("p", { class: "judged" }, verdict >= 0 ? pill(data, verdicts[verdict]) : make("span", { class: "soft" }, "not judged"),
    score === null ? null : make("span", { class: "soft" }, `score ${score}`));
  if (text < 0) return [judged, make("p", { class: "soft" }, "The reply is kept back.")];
  const words = texts[text];
  const body = [words ? spoken(words, search) : make("p", { class: "soft" }, "(an empty reply)"), missing(data, text)];
  if (!folded) return [judged, ...body];
  const hit = search && words.search(search) >= 0 ? " (found in it)" : "";
  return [judged, make("details", { class: "folded", open: unfolded }, make("summary", {}, `Reply to a harmful prompt${hit}`), ...body)];
};

const row = (data, at, prompt, state) => {
  const { prompts, texts, conditions } = data;
  const search = searchFor(state.words);
  const label = prompts.label[prompt];
  const folded = !data.harmless.includes(label);
  const about = [prompts.category[prompt], prompts.source[prompt], prompts.id[prompt]].filter(Boolean).join(" · ");
  const question = make("th", { scope: "row", role: "rowheader" },
    spoken(texts[prompts.text[prompt]], search), missing(data, prompts.text[prompt]),
    make("p", { class: "about" }, label ? make("span", { class: "chip" }, label) : null, make("span", { class: "soft" }, about)));
  const cells = state.columns.map((column) => {
    const cell = at(prompt, column);
    const inner = cell === undefined ? [make("p", { class: "soft" }, "not asked")] : reply(data, cell, search, folded, state.unfolded);
    return make("td", { role: "cell" }, make("p", { class: "under", "aria-hidden": "true" }, conditions[column]), inner);
  });
  return make("tr", { role: "row" }, question, cells);
};

/** How often each verdict was given in a column, of the prompts that fit. */
const tally = (data, at, fitting, column) => {
  const counts = new Map();
  for (const prompt of fitting) {
    const cell = at(prompt, column);
    if (cell === undefined || data.said.verdict[cell] < 0) continue;
    const verdict = data.verdicts[data.said.verdict[cell]];
    counts.set(verdict, (counts.get(verdict) ?? 0) + 1);
  }
  return [...counts].sort((one, other) => other[1] - one[1]).map(([verdict, count]) => `${verdict} ${count.toLocaleString("en")}`).join(" · ");
};

const results = (data, at, state, fitting) => {
  if (!state.columns.length) return make("p", { class: "none" }, "Choose at least one column.");
  if (!fitting.length) return make("p", { class: "none" }, "No prompt fits this search and these filters.");
  const head = state.columns.map((column) => make("th", { scope: "col", role: "columnheader" }, data.conditions[column],
    make("span", { class: "soft tally" }, tally(data, at, fitting, column))));
  const rows = fitting.slice((state.page - 1) * PAGE, state.page * PAGE).map((prompt) => row(data, at, prompt, state));
  return make("table", { class: "said", role: "table", "data-columns": state.columns.length },
    make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, make("th", { scope: "col", role: "columnheader" }, "Prompt"), head)),
    make("tbody", { role: "rowgroup" }, rows));
};
