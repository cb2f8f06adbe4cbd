// Tables: sorted by a click on a column's head where they are long; a box that does not scroll is no stop for the keyboard.

const LONG = 8;

/** The number a cell begins with; null where it begins with none. */
const leading = (text) => {
  const found = text.replaceAll("−", "-").replaceAll(",", "").match(/^[+×]?(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)/i);
  return found ? Number(found[1]) : null;
};
const EMPTY = new Set(["", "—", "–", "-"]);
const compared = (one, other) => {
  const [a, b] = [leading(one), leading(other)];
  if (a !== null && b !== null && a !== b) return a - b;
  return one.localeCompare(other, "en", { numeric: true });
};

const sortable = (table) => {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = make("button", { type: "button", class: "sort", click: () => {
      const next = { none: "ascending", ascending: "descending", descending: "none" }[head.getAttribute("aria-sort") ?? "none"];
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      if (next !== "none") head.setAttribute("aria-sort", next);
      const text = (row) => (row.cells[column].querySelector(".pill")?.lastChild ?? row.cells[column]).textContent.trim();
      const way = next === "descending" ? -1 : 1;
      const sorted = [...original].sort((one, other) => {
        const [a, b] = [text(one), text(other)];
        if (EMPTY.has(a) !== EMPTY.has(b)) return EMPTY.has(a) ? 1 : -1;
        return way * compared(a, b);
      });
      body.append(...(next === "none" ? original : sorted));
    } }, ...head.childNodes);
    head.append(button);
  });
};

const openSheets = () => {
  const boxes = [...document.querySelectorAll(".sheet .scroll")];
  for (const box of boxes) if (box.querySelectorAll("tbody tr").length > LONG) sortable(box.querySelector("table"));
  const look = () => {
    for (const box of boxes) {
      if (box.scrollWidth > box.clientWidth + 1 || box.scrollHeight > box.clientHeight + 1) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    }
  };
  look();
  addEventListener("resize", look);
};
