// Elements and data. Every text goes into the page as a text node: nothing here ever parses HTML.

/** An element; attributes that are true stand alone, those that are false or null are left out, functions listen. */
const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
};

/** The text that a gzipped, base64-coded block of the page holds. */
const unpack = async (id) => {
  const packed = atob(document.getElementById(id).textContent);
  const bytes = new Uint8Array(packed.length);
  for (let at = 0; at < packed.length; at++) bytes[at] = packed.charCodeAt(at);
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
};

const counted = (count, one, many = `${one}s`) => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;

/** Puts a file, made from a text or an address, among the reader's downloads. */
const download = (name, from) => {
  const address = from.startsWith("data:") ? from : URL.createObjectURL(new Blob([from], { type: "text/csv;charset=utf-8" }));
  const link = make("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  if (!from.startsWith("data:")) URL.revokeObjectURL(address);
};
