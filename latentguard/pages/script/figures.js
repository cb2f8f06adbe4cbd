// Around each drawing: the legend whose entries are switches, what hovering shows, downloads, and the numbers as a table.

const hoverBox = make("div", { class: "hover", hidden: true, "aria-hidden": "true" });

/** Vega hands over what lies under the pointer: a mark, or the cell around the nearest one, whose datum is that mark. */
const hoverOf = (told) => (handler, event, item, value) => {
  const left = value === null || value === undefined || value === "";
  const datum = left ? null : item.isVoronoi ? item.datum.datum : item.datum;
  const fields = datum?.line === undefined ? told : [["told", "Reference"]];
  const rows = fields.map(([field, name]) => [name, datum?.[field] ?? ""]).filter(([, value]) => value !== "");
  hoverBox.hidden = !rows.length;
  if (!rows.length) return;
  hoverBox.replaceChildren(make("table", {}, rows.map(([name, value]) => make("tr", {}, make("th", {}, name), make("td", {}, String(value))))));
  const { width, height } = hoverBox.getBoundingClientRect();
  const start = event.clientX + 14 + width > innerWidth ? event.clientX - width - 14 : event.clientX + 14;
  const top = event.clientY + 14 + height > innerHeight ? event.clientY - height - 14 : event.clientY + 14;
  hoverBox.style.left = `${Math.max(4, start)}px`;
  hoverBox.style.top = `${Math.max(4, top)}px`;
};

const SIGNS = {
  circle: "M6 1.5a4.5 4.5 0 1 0 .01 0z", square: "M1.8 1.8h8.4v8.4H1.8z", "triangle-up": "M6 1l5 9.4H1z", diamond: "M6 .6L11 6 6 11.4 1 6z",
  cross: "M4.2 1h3.6v3.2H11v3.6H7.8V11H4.2V7.8H1V4.2h3.2z", "triangle-down": "M6 11L1 1.6h10z", "triangle-right": "M11 6L1.6 11V1z", "triangle-left": "M1 6l9.4-5v10z",
};
const drawing = (tag, attributes) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
};
const sign = (wide, inner) => {
  const svg = drawing("svg", { viewBox: `0 0 ${wide} 12`, width: wide, height: 12, "aria-hidden": "true" });
  svg.append(inner);
  return svg;
};

/** The entries of the legend: series and dashes can be switched off where there are several; references are only named. */
const legend = (figure, changed) => {
  const { series, dashes, lines, pick, kind } = figure.spec.usermeta;
  const hidden = new Set();
  const entry = (key, name, picture, several) => {
    if (!several) return make("li", {}, make("span", { class: "entry" }, picture, name));
    const button = make("button", { type: "button", class: "entry", "aria-pressed": "true", click: () => {
      if (!hidden.delete(key)) hidden.add(key);
      button.setAttribute("aria-pressed", String(!hidden.has(key)));
      changed("hidden", [...hidden]);
    } }, picture, name);
    return make("li", {}, button);
  };
  const coloured = ({ colour, dark: light, shape }) => {
    const path = drawing("path", { d: SIGNS[shape] });
    path.style.setProperty("--colour", colour);
    path.style.setProperty("--colour-dark", light);
    return sign(12, path);
  };
  const dashed = (dash) => sign(28, drawing("path", { d: "M0 6h28", "stroke-dasharray": dash.join(" "), class: "dash" }));
  const shaped = ({ dash, shape }) => (kind === "line" ? dashed(dash) : sign(12, drawing("path", { d: SIGNS[shape], class: "plain" })));
  const entries = [
    ...series.map((one) => entry(`s:${one.name}`, one.name, coloured(one), series.length > 1)),
    ...dashes.map((one) => entry(`d:${one.name}`, one.name, shaped(one), dashes.length > 1)),
    ...lines.map(({ text, dash }) => entry("", text, dashed(dash), false)),
  ];
  const label = series.length + dashes.length > 1 ? "Legend: switch a series off or on" : "Legend";
  const list = entries.length ? make("ul", { class: "legend", "aria-label": label }, entries) : null;
  const id = `${figure.id}-pick`;
  const select = pick ? make("select", { id, change: () => changed("picked", select.value) }, pick.values.map((value) => make("option", { value }, value))) : null;
  const chosen = select ? make("p", { class: "pick" }, make("label", { for: id }, pick.name), select) : null;
  const state = () => ({ hidden: [...hidden], ...(select ? { picked: select.value } : {}) });
  return { elements: [chosen, list].filter(Boolean), state };
};

const quoted = (value) => {
  const text = value === null || value === undefined ? "" : String(value);
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
};
const asCsv = ({ columns, cells }) => {
  const rows = (cells[0] ?? []).map((_, row) => cells.map((column) => quoted(column[row])).join(","));
  return [columns.map(quoted).join(","), ...rows].join("\r\n") + "\r\n";
};

const MOST_ROWS = 500;
const asTable = ({ title, columns, cells }) => {
  const count = cells[0]?.length ?? 0;
  const rows = Array.from({ length: Math.min(count, MOST_ROWS) }, (_, row) => make("tr", {}, cells.map((column) => make("td", {}, String(column[row] ?? "—")))));
  const head = make("thead", {}, make("tr", {}, columns.map((name) => make("th", { scope: "col" }, name))));
  const table = make("table", {}, head, make("tbody", {}, rows));
  const box = make("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": `The numbers of: ${title}` }, table);
  return [box, count > MOST_ROWS ? make("p", { class: "soft" }, `The first ${MOST_ROWS} of ${counted(count, "row")}; “Data (CSV)” holds them all.`) : null];
};

const tools = (element, figure) => {
  const count = figure.cells[0]?.length ?? 0;
  const still = element.querySelector("img.still");
  const kind = still?.src.startsWith("data:image/svg") ? "svg" : "png";
  const buttons = make("p", { class: "tools" },
    count ? make("button", { type: "button", click: () => download(`${figure.file}.csv`, asCsv(figure)) }, "Data (CSV)") : null,
    still ? make("button", { type: "button", click: () => download(`${figure.file}.${kind}`, still.src) }, `Picture (${kind.toUpperCase()})`) : null);
  for (const button of buttons.children) button.setAttribute("aria-describedby", `${figure.id}-title`);
  if (!count) return [buttons];
  const table = make("details", { class: "numbers", toggle: () => {
    if (table.open && table.children.length === 1) table.append(...asTable(figure).filter(Boolean));
  } }, make("summary", {}, `The numbers as a table (${counted(count, "row")})`));
  return [buttons, table];
};

/** Draws a figure when it comes near the window, and again when its width or the scheme of colours changes. */
const chart = (element, figure) => {
  const plate = element.querySelector(".plate");
  const box = make("div", { "aria-hidden": "true" });
  const hover = hoverOf(figure.spec.usermeta.hover);
  let view = null;
  let width = 0;
  let turn = Promise.resolve();
  const { elements, state } = legend(figure, (signal, value) => view?.signal(signal, value).runAsync());
  const redraw = () => {
    turn = turn.then(async () => {
      view?.finalize();
      delete element.dataset.drawn;
      width = plate.clientWidth;
      element.classList.add("drawn");
      view = await draw(figure.spec, box, hover);
      for (const [signal, value] of Object.entries(state())) view.signal(signal, value);
      await view.runAsync();
      element.dataset.drawn = "yes";
    });
  };
  plate.append(make("div", { class: "chart", role: "img", "aria-label": `${figure.title}. The numbers as a table stand below.` }, box));
  plate.before(...elements);
  const near = new IntersectionObserver((seen) => {
    if (!seen.some((one) => one.isIntersecting)) return;
    near.disconnect();
    redraw();
    dark.addEventListener("change", redraw);
    let later = null;
    new ResizeObserver(() => {
      if (plate.clientWidth === 0 || Math.abs(plate.clientWidth - width) < 3) return;
      clearTimeout(later);
      later = setTimeout(redraw, 120);
    }).observe(plate);
  }, { rootMargin: "500px 0px" });
  near.observe(plate);
};

const openFigures = (figures) => {
  for (const figure of figures) {
    const element = document.getElementById(figure.id);
    if (figure.spec) chart(element, figure);
    element.append(...tools(element, figure));
  }
  document.body.append(hoverBox);
  addEventListener("scroll", () => { hoverBox.hidden = true; }, { passive: true });
};
