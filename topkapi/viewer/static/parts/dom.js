// Makes elements. Text goes in as text nodes and never as HTML: tokens are untrusted.

/** An element. In `props`, `class`, `style` (object, set through CSSOM because of the content security policy),
 * `data`, `on` (listeners) and properties of the element; names with a hyphen, and role, become attributes. */
export function h(tag, props = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null) continue;
    if (name === "class") made.className = value;
    else if (name === "style") setStyle(made, value);
    else if (name === "data") Object.assign(made.dataset, value);
    else if (name === "on")
      for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    else if (name.includes("-") || name === "role" || name === "for") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

function setStyle(element, style) {
  for (const [name, value] of Object.entries(style)) element.style.setProperty(name, value);
}

let lastId = 0;
/** A number for an id that no other element has. */
export const freshId = (what) => `${what}-${++lastId}`;

/** A field with its label above it. */
export function field(label, input) {
  input.id ||= freshId("field");
  return h("div", { class: "field" }, h("label", { for: input.id }, label), input);
}

/** A card: a section with a heading, what belongs beside the heading, and a body. */
export function card(title, { beside, className = "", info } = {}, ...body) {
  const id = freshId("card");
  return h(
    "section",
    { class: `card ${className}`, "aria-labelledby": id },
    h(
      "div",
      { class: "card-head" },
      h("h2", { id }, title),
      info ? explain(info) : null,
      beside ? h("div", { class: "beside" }, beside) : null,
    ),
    ...body,
  );
}

/** A small "?" that tells what a number is, on hover, focus and click. */
export function explain(text) {
  return h(
    "button",
    { class: "explain", type: "button", "aria-label": "What this is", "aria-description": text, data: { tip: text } },
    "?",
  );
}

/** A word that says what it means, on hover, focus and click. */
export function term(text, meaning) {
  return h("button", { class: "term", type: "button", data: { tip: meaning }, "aria-description": meaning }, text);
}

/** A choice among few as buttons side by side. `choices`: [[value, text], ...]. */
export function segmented(label, choices, chosen, onChoose) {
  const group = h("div", { class: "segmented", role: "group", "aria-label": label });
  const show = (value) => {
    for (const button of group.children) button.setAttribute("aria-pressed", String(button.value === String(value)));
  };
  for (const [value, text] of choices) {
    group.append(
      h(
        "button",
        {
          type: "button",
          value,
          on: {
            click: () => {
              show(value);
              onChoose(value);
            },
          },
        },
        text,
      ),
    );
  }
  group.show = show;
  show(chosen);
  return group;
}

/** Replaces what is in an element. */
export function fill(element, ...children) {
  element.replaceChildren(
    ...children.flat().filter((child) => child !== null && child !== undefined && child !== false),
  );
  return element;
}

/** What is shown where something is empty, failed or still to come. */
export function stateNote(kind, title, text, ...more) {
  return h(
    "div",
    { class: `state-note ${kind}`, role: kind === "failed" ? "alert" : "note" },
    h("strong", {}, title),
    text ? h("p", {}, text) : null,
    ...more,
  );
}

/** Says something to screen readers without moving anything on the page. */
export function announce(text) {
  document.getElementById("live").textContent = text;
}

/** Calls `what` once per frame at most. */
export function oncePerFrame(what) {
  let due = 0;
  return (...given) => {
    cancelAnimationFrame(due);
    due = requestAnimationFrame(() => what(...given));
  };
}
