// A button that copies a command; where the browser does not let a page copy, the command is selected.

const openCommands = () => {
  for (const box of document.querySelectorAll(".command")) {
    const code = box.querySelector("code");
    const told = make("span", { role: "status", class: "soft" });
    const copy = async () => {
      try {
        await navigator.clipboard.writeText(code.textContent);
        told.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code);
        told.textContent = "Selected: copy it with Ctrl+C or ⌘C";
      }
    };
    box.append(make("p", { class: "tools" }, make("button", { type: "button", click: copy }, "Copy the command"), told));
  }
};
