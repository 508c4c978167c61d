// Tabs: one panel is open; arrow keys go from tab to tab.

export class Tabs {
  /** @param onOpen receives the id of the panel that is opened */
  constructor(list, onOpen) {
    this.tabs = [...list.querySelectorAll("[role=tab]")];
    this.onOpen = onOpen;
    for (const tab of this.tabs) {
      tab.addEventListener("click", () => this.open(tab.getAttribute("aria-controls")));
      tab.addEventListener("keydown", (event) => this.moveByKey(event));
    }
    this.open(this.tabs[0].getAttribute("aria-controls"));
  }

  open(id) {
    for (const tab of this.tabs) {
      const isOpen = tab.getAttribute("aria-controls") === id;
      tab.setAttribute("aria-selected", String(isOpen));
      tab.tabIndex = isOpen ? 0 : -1;
      document.getElementById(tab.getAttribute("aria-controls")).hidden = !isOpen;
    }
    this.onOpen(id);
  }

  moveByKey(event) {
    const at = this.tabs.indexOf(event.target);
    const last = this.tabs.length - 1;
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    const tab = this.tabs.at(next % this.tabs.length);
    tab.focus();
    this.open(tab.getAttribute("aria-controls"));
  }
}
