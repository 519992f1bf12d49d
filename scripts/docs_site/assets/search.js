// A list of what holds all words that are typed: titles first, then texts. The index is a script, so that the site works as files too.
const field = document.getElementById("search");
const results = document.getElementById("search-results");
const MOST_RESULTS = 12;

function rank(entry, words) {
  const title = entry.title.toLowerCase();
  if (words.every((word) => title.includes(word))) return title === words.join(" ") ? 0 : 1 + title.length / 1000;
  const text = (title + " " + entry.text).toLowerCase();
  return words.every((word) => text.includes(word)) ? 2 : Infinity;
}

function show(entry) {
  const item = document.createElement("li");
  const link = document.createElement("a");
  link.href = ROOT + entry.link;
  link.textContent = entry.title;
  item.append(link);
  return item;
}

field.addEventListener("input", () => {
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = words.length ? SEARCH_INDEX.map((entry) => ({ entry, rank: rank(entry, words) })) : [];
  const best = found.filter((one) => one.rank < Infinity).sort((one, other) => one.rank - other.rank);
  results.replaceChildren(...best.slice(0, MOST_RESULTS).map((one) => show(one.entry)));
});

field.addEventListener("keydown", (event) => {
  const first = results.querySelector("a");
  if (event.key === "Enter" && first) first.click();
  if (event.key === "Escape") { field.value = ""; results.replaceChildren(); }
});
