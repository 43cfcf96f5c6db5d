// A symbol is one thing: whichever of its places is clicked or focused, all of them light up.
const bar = document.getElementById("bar");

function light(key) {
  document.querySelectorAll(".lit").forEach((place) => place.classList.remove("lit"));
  bar.hidden = !key;
  bar.textContent = "";
  if (!key) return;
  const places = document.querySelectorAll(`:is(section, table) [data-sym="${key}"]`);
  places.forEach((place) => place.classList.add("lit"));
  const n = places.length;
  bar.innerHTML = document.getElementById(`meaning-${key}`).innerHTML;
  bar.append(` ${n} ${n === 1 ? "place" : "places"} on this page`);
}

function keyOf(event) {
  return event.target.closest("[data-sym]")?.dataset.sym;
}

document.addEventListener("click", (event) => {
  if (!event.target.closest("#bar, a")) light(keyOf(event));
});
document.addEventListener("focusin", (event) => {
  if (keyOf(event)) light(keyOf(event));
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") light();
});
document.querySelector("[aria-current]").scrollIntoView({ inline: "center", block: "nearest" });
