"use strict";

const find = (id) => document.getElementById(id);
let visitor = null;

// Text is only ever set as text, so nothing that anyone types becomes a part of the page.
function element(tag, text, name) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (name) made.className = name;
  return made;
}

function show(text, name) {
  const turn = element("li", text, name);
  find("turns").append(turn);
  turn.scrollIntoView({ block: "end" });
  return turn;
}

function fill(list, parts) {
  list.replaceChildren(...(parts.length ? parts : [element("li", "Nothing yet", "empty")]));
}

function choices(turn, names) {
  const row = element("div", "", "choices");
  names.forEach((name, number) => {
    const button = element("button", name);
    button.type = "button";
    button.addEventListener("click", () => {
      row.remove();
      say(String(number + 1), name);
    });
    row.append(button);
  });
  turn.append(row);
}

function weight([name, share]) {
  const part = element("li", `${name}, ${Math.round(100 * share)} %`);
  const bar = document.createElement("meter");
  bar.value = share;
  part.append(bar);
  return part;
}

async function post(path, body) {
  const answer = await fetch(path, { method: "POST", body: JSON.stringify(body) });
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error);
  return found;
}

async function say(text, shown = text) {
  if (!text.trim()) return;
  show(shown, "you");
  find("send").disabled = true;
  try {
    if (visitor === null) visitor = (await post("/begin", {})).visitor;
    const turn = await post("/say", { visitor, text });
    turn.notes.forEach((note) => show(note, "note"));
    const said = show(turn.text, "bot");
    if (turn.choices.length) {
      choices(said, turn.choices);
    } else {
      fill(find("suggestions"), turn.suggestions.map((name) => element("li", name)));
      fill(find("attention"), turn.attention.map(weight));
      find("why").hidden = !turn.picture;
      if (turn.picture) find("picture").src = `/picture/${visitor}.png?${Date.now()}`;
    }
    said.scrollIntoView({ block: "end" });
  } catch (error) {
    show(`That did not work: ${error.message}`, "note");
  }
  find("send").disabled = false;
  find("text").focus();
}

find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = find("text").value;
  find("text").value = "";
  say(text);
});
