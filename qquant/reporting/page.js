"use strict";
// Turns the heads of every `.sortable` table into buttons that sort its rows, and lets the profile
// that is in the page be saved. The first click on figures puts the largest first, on names the
// first of the alphabet; the next click turns it round. Empty cells stay last either way.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const numeric = [...body.rows].some((row) => "value" in row.cells[column].dataset);
    head.style.textAlign = numeric && column ? "right" : "left";
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const was = head.getAttribute("aria-sort");
      const order = was ? (was === "ascending" ? "descending" : "ascending")
                        : numeric ? "descending" : "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      sort(body, column, numeric, order === "ascending" ? 1 : -1);
    });
  });
}

function sort(body, column, numeric, sign) {
  const key = (row) => {
    const cell = row.cells[column];
    if (!numeric) return cell.textContent.trim() || null;
    return "value" in cell.dataset ? Number(cell.dataset.value) : null;
  };
  const compare = (a, b) => {
    const [one, two] = [key(a), key(b)];
    if (one === null || two === null) return (one === null) - (two === null);
    return sign * (numeric ? one - two : one.localeCompare(two, "en", { numeric: true }));
  };
  body.append(...[...body.rows].sort(compare));
}

const save = document.getElementById("save");
save.hidden = false;
save.addEventListener("click", () => {
  const text = document.getElementById("profile").textContent;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "profile.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
