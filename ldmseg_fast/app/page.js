() => {
  // Gradio leaves examples and the colours of the brush without names for those who do not see them.
  const called = (element, name) => {
    element.setAttribute("aria-label", name);
    element.title = name;
  };
  const name = () => {
    for (const each of document.querySelectorAll(".gallery-item:not([aria-label])")) {
      called(each, `Example ${1 + [...each.parentElement.children].indexOf(each)}`);
    }
    const brushes = [...document.querySelectorAll("#complete-legend li")];
    for (const each of document.querySelectorAll("#complete-editor button.color")) {
      const color = each.style.backgroundColor;
      const brush = brushes.find((item) => item.querySelector("span").style.backgroundColor === color);
      const text = brush ? brush.textContent : `Colour ${color}`;
      if (each.title !== text) called(each, text);
    }
  };
  new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
  name();
}
