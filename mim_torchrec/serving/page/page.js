"use strict";
const $ = id => document.getElementById(id);
const LINKS = 12; // users that are listed
let preview = null; // address of the picture of the new item
let asked = 0; // requests of this page, so that a late answer is not shown

function el(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter(child => child !== null));
  return made;
}

async function load(address, options) {
  const answer = await fetch(address, options);
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error);
  return body;
}

function say(problem) {
  $("error").textContent = problem;
  $("error").hidden = !problem;
}

// words

const percent = value => `${(100 * value).toFixed(1)}%`;
const signed = value => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;
const many = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

function time(seconds) {
  const units = [["year", 31557600], ["month", 2629800], ["day", 86400], ["hour", 3600], ["minute", 60]];
  const [unit, size] = units.find(([, size]) => seconds >= size) || ["second", 1];
  return many(Math.floor(seconds / size), unit);
}

function facts(item) {
  const age = item.age === null ? null : item.is_new ? "new" : item.age < 0 ? "listed later" : `${time(item.age)} old`;
  return [item.category, age].filter(Boolean).join(" · ");
}

function moved(item) {
  const places = item.rank_without - item.rank;
  if (!places) return el("span", { className: "move" }, "Content leaves its rank.");
  const way = places > 0 ? "▲ up" : "▼ down";
  const said = `${way} ${many(Math.abs(places), "place")} by content, from ${item.rank_without}`;
  return el("span", { className: `move ${places > 0 ? "up" : "down"}` }, said);
}

function likeness(item) {
  if (!item.has_vector) return "It has no vector yet: content says nothing of it.";
  if (!item.alike.length) return "Nothing that this user did has a vector to compare with.";
  if (item.alike[0].words === "not similar") return "Like nothing that this user did. Nearest:";
  return "Most like what this user did:";
}

// pictures

function picture(item) {
  const source = item.is_new ? preview : `demo/items/${item.item_id}/image`;
  return el("img", { src: source, alt: item.title || `item ${item.item_id}`, loading: "lazy" });
}

function track(item, low, high) {
  const at = value => `${100 * (value - low) / (high - low)}%`;
  const line = el("i");
  line.style.left = at(Math.min(item.score, item.without));
  line.style.width = `${100 * Math.abs(item.score - item.without) / (high - low)}%`;
  const dots = [["without", item.without], ["with", item.score]].map(([name, value]) => {
    const dot = el("b", { className: name });
    dot.style.left = at(value);
    return dot;
  });
  const made = el("div", { className: `track ${item.score < item.without ? "down" : "up"}` }, line, ...dots);
  made.setAttribute("role", "img");
  made.setAttribute("aria-label", `${percent(item.score)} with content, ${percent(item.without)} without`);
  return made;
}

// the parts of a card

function alike(other) {
  return el("li", { title: other.title }, picture(other), other.words || other.cosine.toFixed(2));
}

function closer(other) {
  return other.closer_than === null ? "" : `, closer than ${percent(other.closer_than)} of pairs`;
}

function numbers(item) {
  const rows = Object.entries(item.interests).map(([name, lost]) => [`logit lost without ${name} interest`, signed(lost)]);
  item.because.forEach(other => rows.push([`logit lost without ${other.title}`, signed(other.lost)]));
  item.alike.forEach(other => rows.push([`cosine to ${other.title}${closer(other)}`, other.cosine.toFixed(3)]));
  return el("dl", { className: "numbers" }, ...rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}

function because(item) {
  if (!item.because.length) return null;
  return el("p", { className: "quiet" }, `Raised most by: ${item.because.map(other => other.title).join(", ")}.`);
}

function card(item, content, low, high) {
  const heading = el("h3", {}, el("span", { className: "rank" }, `${item.rank}. `), item.title);
  const score = el("p", {}, el("span", { className: "score" }, percent(item.score)), content ? " " : null, content ? moved(item) : null);
  const own = [heading, el("p", { className: "quiet" }, facts(item), " ", item.clicked ? el("span", { className: "clicked" }, "clicked") : null), score];
  if (content) {
    own.push(track(item, low, high), el("p", { className: "quiet" }, likeness(item)));
    own.push(el("ul", { className: "alike" }, ...item.alike.map(alike)));
  }
  return el("li", { className: `card${item.is_new ? " new" : ""}` }, picture(item), el("div", {}, ...own, because(item), numbers(item)));
}

function render(found) {
  const shown = found.candidates;
  const values = shown.flatMap(item => [item.score, item.without]);
  let low = Math.min(...values), high = Math.max(...values);
  if (high - low < 1e-4) [low, high] = [low - 5e-5, high + 5e-5];
  $("versions").textContent = `model ${found.model_version}` + (found.table_version ? ` · vectors ${found.table_version.slice(0, 12)}` : "");
  $("did").textContent = `What user ${found.user_id} did, newest first`;
  $("history").replaceChildren(...found.history.map(item => el("li", { title: item.title }, picture(item), el("div", {}, item.title,
    el("p", { className: "quiet" }, [item.category, item.ago === null ? null : `${time(item.ago)} before`].filter(Boolean).join(" · "))))));
  const scale = `The line runs from ${percent(low)} to ${percent(high)}, the lowest and the highest score shown.`;
  $("legend").textContent = found.content
    ? `The percentage is the probability of a click. Filled dot: with content; ring: without. ${scale} Ranks are among all ${found.count} candidates. Similarity is in comparison with other pairs of items.`
    : "The percentage is the probability of a click. This model has no content interest.";
  $("ranked").replaceChildren(...shown.map(item => card(item, found.content, low, high)));
  const added = shown.find(item => item.is_new);
  $("status").textContent = added
    ? `The new item ranks ${added.rank} of ${found.count}; without content it would rank ${added.rank_without}.`
    : `User ${found.user_id}: ${found.count} candidates, ${many(found.behaviors, "behavior")}.`;
  $("forget").hidden = !added;
  document.title = `User ${found.user_id} · Content interest`;
  for (const link of $("found").querySelectorAll("a")) mark(link);
}

// users

const chosen = () => new URLSearchParams(location.search).get("user");

function mark(link) {
  if (link.dataset.user === chosen()) link.setAttribute("aria-current", "page");
  else link.removeAttribute("aria-current");
}

function link(user, ...words) {
  const made = el("a", { href: `?user=${encodeURIComponent(user)}` }, ...words);
  made.dataset.user = user;
  mark(made);
  return made;
}

async function search() {
  const mine = $("search").value.trim();
  const { users, count } = await load(`demo/users?search=${encodeURIComponent(mine)}`);
  if (mine !== $("search").value.trim()) return null;
  const listed = users.slice(0, LINKS);
  $("known").textContent = users.length > LINKS || mine ? `${listed.length} of ${count} users` : many(count, "user");
  $("found").replaceChildren(...listed.map(u => link(u.user_id, u.user_id, el("span", { className: "quiet" }, ` ${many(u.behaviors, "behavior")}`))));
  return users;
}

async function show(options) {
  const user = chosen(), mine = ++asked;
  say("");
  $("ranked").classList.add("busy");
  try {
    const address = options ? `demo/what-if?${options.query}` : `demo/users/${encodeURIComponent(user)}`;
    const found = await load(address, options && { method: "POST", body: options.file });
    if (mine !== asked) return;
    render(found);
    document.body.dataset.user = user;
    if (options) document.querySelector(".card.new").scrollIntoView({ block: "nearest" });
  } catch (error) {
    if (mine === asked) say(options ? `The new item cannot be ranked: ${error.message}` : `This user cannot be shown: ${error.message}`);
  } finally {
    if (mine === asked) $("ranked").classList.remove("busy");
  }
}

function open(user) {
  history.pushState(null, "", `?user=${encodeURIComponent(user)}`);
  return show();
}

$("found").addEventListener("click", event => {
  const target = event.target.closest("a");
  if (!target || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  open(target.dataset.user);
});
$("search").addEventListener("input", () => search().catch(error => say(error.message)));
$("find").addEventListener("submit", async event => {
  event.preventDefault();
  try {
    const users = await search();
    if (!users) return;
    if (users.length) open(users[0].user_id);
    else say(`There is no user whose id holds “${$("search").value.trim()}”.`);
  } catch (error) {
    say(error.message);
  }
});
$("numbers").addEventListener("change", () => document.body.classList.toggle("show-numbers", $("numbers").checked));
addEventListener("popstate", () => show());

// a new item

function given(file) {
  if (preview) URL.revokeObjectURL(preview);
  preview = file ? URL.createObjectURL(file) : null;
  $("preview").hidden = !file;
  if (file) $("preview").src = preview;
  if (file && !$("title").value) $("title").value = file.name.replace(/\.\w+$/, "").replace(/[-_]+/g, " ");
}

function take(files) {
  if (!files.length || $("what-if").hidden) return;
  $("picture").files = files;
  given(files[0]);
}

const drop = document.querySelector(".drop");
for (const [name, over] of [["dragenter", true], ["dragover", true], ["dragleave", false], ["drop", false]]) {
  drop.addEventListener(name, event => {
    event.preventDefault();
    drop.classList.toggle("over", over);
    if (name === "drop") take(event.dataTransfer.files);
  });
}
addEventListener("paste", event => take(event.clipboardData.files));
$("picture").addEventListener("change", () => given($("picture").files[0]));
$("what-if").addEventListener("submit", event => {
  event.preventDefault();
  const query = new URLSearchParams({ user: chosen(), title: $("title").value, category: $("category").value });
  show({ query, file: $("picture").files[0] });
});
$("forget").addEventListener("click", () => show());

async function begin() {
  const [about, users] = await Promise.all([load("demo/about"), search()]);
  $("what-if").hidden = about.what_if_problem !== null;
  $("no-what-if").hidden = about.what_if_problem === null;
  $("no-what-if").textContent = about.what_if_problem === null ? "" : `Not here: ${about.what_if_problem}.`;
  $("category").replaceChildren(...about.categories.map(name => el("option", {}, name)));
  $("of-category").hidden = !about.categories.length;
  if (chosen() === null) {
    if (!users || !users.length) return say("The test requests have no user with behaviors.");
    history.replaceState(null, "", `?user=${encodeURIComponent(users[0].user_id)}`);
  }
  await show();
}
begin().catch(error => say(error.message));
