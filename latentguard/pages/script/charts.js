// A Vega-Lite specification → a drawing of the right width and colours.

const dark = matchMedia("(prefers-color-scheme: dark)");

/** Vega's function that draws; its bundle is unpacked once, when the first figure needs it. */
let vegaIsHere = null;
const vega = () => {
  vegaIsHere ??= unpack("vega").then((code) => {
    document.head.append(make("script", {}, code));
    return window.latentguardVega;
  });
  return vegaIsHere;
};

/** What the page's style sheet says of colours and letters, as Vega wants it. */
const theme = (meta, { range }, width) => {
  const css = getComputedStyle(document.documentElement);
  const colour = (name) => css.getPropertyValue(name).trim();
  const [ink, soft, line] = ["--ink", "--soft", "--line"].map(colour);
  const font = css.getPropertyValue("--sans");
  return {
    background: null,
    font,
    ...(dark.matches ? { range: { ...range, category: meta.dark } } : { range }),
    title: { anchor: "start", frame: "group", font, fontSize: 12, fontWeight: "normal", color: soft, offset: 10, limit: width - 60 },
    axis: {
      labelFont: font, titleFont: font, labelFontSize: 11.5, titleFontSize: 12, titleFontWeight: "normal", labelColor: soft, titleColor: soft,
      domainColor: line, tickColor: line, gridColor: line, gridOpacity: 0.7, tickSize: 4, labelPadding: 4, titlePadding: 8, labelLimit: meta.kind === "lying" ? Math.min(260, width * 0.38) : 150,
      labelOverlap: true,
    },
    axisX: { grid: false },
    axisQuantitative: { tickCount: 6 },
    header: { labelFont: font, labelFontSize: 12.5, labelFontWeight: 600, labelColor: ink, labelAnchor: "start", labelPadding: 6, labelLimit: width / columnsFor(meta, width) - 70 },
    legend: { labelFont: font, titleFont: font, labelColor: soft, titleColor: soft, titleFontWeight: "normal", titleFontSize: 12, gradientLength: 180 },
    view: { stroke: null },
    line: { strokeWidth: 2 },
    bar: { cornerRadiusEnd: 1 },
    style: {
      reference: { color: soft, strokeWidth: 1.4 },
      "reference-band": { color: soft, opacity: 0.1 },
      whisker: { color: ink },
      also: { color: soft },
      "cell-of-heat": { stroke: colour("--ground"), strokeWidth: 1 },
    },
  };
};

/** Columns that fill their rows evenly; names at the left need room. */
const columnsFor = ({ panels, kind }, width) => {
  const most = Math.max(1, Math.min(panels, Math.floor(width / (kind === "lying" ? 620 : 300)), 3));
  return Math.ceil(panels / Math.ceil(panels / most));
};

/** Gives every view of a specification its width, and says how many stand in a row. */
const sized = (spec, width, beside) => {
  const views = spec.concat ?? [spec.spec ?? spec];
  const panelled = Boolean(spec.spec ?? spec.concat);
  const columns = panelled ? columnsFor(spec.usermeta, width) : 1;
  if (panelled) spec.columns = columns;
  for (const view of views) {
    view.width = Math.max(110, Math.floor(width / columns - beside));
    if (spec.concat) view.title.limit = view.width;
    if (Number.isFinite(view.height) && spec.usermeta.kind !== "heat") view.height = Math.round(Math.min(300, Math.max(200, view.width * 0.6)));
  }
  return columns;
};

/** What stands beside the axes of a figure is known once it is drawn; kept, so that it is drawn twice at most the first time. */
const besides = new Map();

/** Draws a figure into a box as wide as the box is, and gives Vega's view. */
const draw = async (specification, box, hover) => {
  const embed = await vega();
  const width = box.clientWidth;
  const options = { mode: "vega-lite", ast: true, actions: false, renderer: "svg", hover: false, defaultStyle: false, tooltip: hover };
  let beside = besides.get(box) ?? 56;
  for (let attempt = 0; ; attempt++) {
    const spec = structuredClone(specification);
    const columns = sized(spec, width, beside);
    spec.config = theme(spec.usermeta, spec.config, width);
    const { view } = await embed(box, spec, options);
    const over = box.querySelector("svg").getBoundingClientRect().width - width;
    besides.set(box, beside);
    if (attempt === 2 || (over <= 0 && over > -24)) return view;
    beside += Math.ceil((over + 2) / columns);
    view.finalize();
  }
};
