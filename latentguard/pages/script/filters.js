// Replies: search, filters, columns, pages, and the address that leads back to a view.

const fresh = (data) => ({ words: "", label: "", category: "", verdict: "", columns: [...data.shown], page: 1, unfolded: false });

/** The view that the page's address asks for: #replies&words=…&label=…; what it does not know is left as it is at first. */
const fromAddress = (id, data) => {
  const [name, ...rest] = location.hash.slice(1).split("&");
  if (name !== id || !rest.length) return null;
  const told = new URLSearchParams(rest.join("&"));
  const state = fresh(data);
  for (const key of ["words", "label", "category"]) state[key] = told.get(key) ?? "";
  state.verdict = told.get("verdict") ?? (told.has("differs") ? DIFFERS : "");
  const columns = (told.get("columns") ?? "").split(".").map(Number).filter((column) => Number.isInteger(column) && column >= 0 && column < data.conditions.length);
  if (told.get("columns")) state.columns = [...new Set(columns)].slice(0, MOST_COLUMNS);
  state.page = Math.max(1, Number.parseInt(told.get("page") ?? "1", 10) || 1);
  return state;
};

const toAddress = (id, data, state) => {
  const told = new URLSearchParams();
  for (const key of ["words", "label", "category"]) if (state[key]) told.set(key, state[key]);
  if (state.verdict === DIFFERS) told.set("differs", "yes");
  else if (state.verdict) told.set("verdict", state.verdict);
  if (state.columns.join(".") !== data.shown.join(".")) told.set("columns", state.columns.join("."));
  if (state.page > 1) told.set("page", state.page);
  const is = location.hash.slice(1).split("&")[0] === id;
  if (String(told) || is) history.replaceState(null, "", `#${id}${String(told) ? `&${told}` : ""}`);
};

const choice = (id, name, first, options, changed) => {
  const select = make("select", { id, change: () => changed(select.value) }, make("option", { value: "" }, first),
    options.map(([value, text]) => make("option", { value }, text)));
  return { select, field: make("p", { class: "field", hidden: options.length < 1 }, make("label", { for: id }, name), select) };
};

const different = (values) => [...new Set(values.filter(Boolean))].map((value) => [value, value]);

const openReplies = (data) => {
  const box = document.getElementById(data.id);
  const at = placed(data);
  let state = fromAddress(data.id, data) ?? fresh(data);
  const change = (more) => { Object.assign(state, { page: 1 }, more); update(); };
  const name = (part) => `${data.id}-${part}`;

  const words = make("input", { type: "search", id: name("words"), autocomplete: "off", spellcheck: "false", input: () => change({ words: words.value }) });
  const search = make("p", { class: "field grow" }, make("label", { for: name("words") }, "Search prompts, replies, categories"), words);
  const label = choice(name("label"), "Kind of prompt", "all kinds", different(data.prompts.label), (value) => change({ label: value }));
  const category = choice(name("category"), "Category", "all categories", different(data.prompts.category).sort(), (value) => change({ category: value }));
  const verdict = choice(name("verdict"), "Verdict", "any verdict", [...data.verdicts.map((one) => [one, `${one}, in some column`]), [DIFFERS, "differs between columns"]],
    (value) => change({ verdict: value }));

  const boxes = data.conditions.map((condition, column) => make("input", { type: "checkbox", id: name(`column-${column}`), change: () => {
    const columns = new Set(state.columns);
    if (!columns.delete(column)) columns.add(column);
    change({ columns: [...columns] });
  } }));
  const chosen = make("summary", {});
  const columns = make("details", { class: "choose", hidden: data.conditions.length < 2 }, chosen,
    make("fieldset", {}, make("legend", {}, `What stands side by side, at most ${MOST_COLUMNS}`),
      make("div", { class: "list" }, boxes.map((input, column) => make("label", { for: input.id }, input, data.conditions[column])))));

  const count = make("p", { class: "count", role: "status" });
  const unfold = make("button", { type: "button", "aria-pressed": "false", click: () => { state.unfolded = !state.unfolded; update(); } }, "Unfold all replies");
  const clear = make("button", { type: "button", click: () => { state = fresh(data); update(); words.focus(); } }, "Start over");
  const output = make("div", { class: "results", id: name("results") });

  const turn = (by) => {
    if (state.page + by < 1 || state.page + by > pages) return;
    state.page += by;
    update();
    count.scrollIntoView({ block: "start" });
  };
  let pages = 1;
  const previous = make("button", { type: "button", click: () => turn(-1) }, "Previous page");
  const next = make("button", { type: "button", click: () => turn(1) }, "Next page");
  const where = make("span", {});
  const pager = make("nav", { class: "pager", "aria-label": "Pages of replies" }, previous, where, next);

  const update = () => {
    const { asked, fitting } = found(data, at, state);
    pages = Math.max(1, Math.ceil(fitting.length / PAGE));
    state.page = Math.min(state.page, pages);
    if (words.value !== state.words) words.value = state.words;
    label.select.value = state.label;
    category.select.value = state.category;
    verdict.select.value = state.verdict;
    boxes.forEach((input, column) => {
      input.checked = state.columns.includes(column);
      input.disabled = !input.checked && state.columns.length >= MOST_COLUMNS;
    });
    chosen.textContent = `Columns: ${state.columns.length} of ${data.conditions.length}`;
    const others = data.prompts.id.length - asked.length;
    count.textContent = `${fitting.length.toLocaleString("en")} of ${counted(asked.length, "prompt")}` +
      (others ? ` (${others.toLocaleString("en")} more under other columns)` : "");
    unfold.setAttribute("aria-pressed", String(state.unfolded));
    unfold.textContent = state.unfolded ? "Fold replies to harmful prompts" : "Unfold all replies";
    where.textContent = `Page ${state.page} of ${pages}`;
    previous.setAttribute("aria-disabled", String(state.page <= 1));
    next.setAttribute("aria-disabled", String(state.page >= pages));
    pager.hidden = pages < 2;
    output.replaceChildren(results(data, at, state, fitting));
    toAddress(data.id, data, state);
  };

  box.append(make("search", { class: "filters" }, make("div", { class: "fields" }, search, label.field, category.field, verdict.field), columns),
    make("div", { class: "bar" }, count, make("p", { class: "tools" }, unfold, clear)), output, pager);
  addEventListener("hashchange", () => {
    const asked = fromAddress(data.id, data);
    if (asked) { state = { ...asked, unfolded: state.unfolded }; update(); }
  });
  update();
  if (fromAddress(data.id, data)) box.scrollIntoView();
};
