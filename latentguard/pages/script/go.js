// Starts everything. A browser that cannot unpack the data keeps the stills and is told so.

const go = async () => {
  openSheets();
  openCommands();
  if (!("DecompressionStream" in window)) {
    const words = "This browser is too old to unpack the replies and the moving figures (it lacks DecompressionStream). The pictures stand; the replies are in rows.jsonl.";
    for (const box of document.querySelectorAll(".replies")) box.append(make("p", { class: "text" }, words));
    return;
  }
  const { figures, replies } = JSON.parse(await unpack("data"));
  replies.forEach(openReplies);
  openFigures(figures);
  performance.mark("ready");
  document.documentElement.dataset.ready = "yes";
};
go();
