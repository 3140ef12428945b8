from __future__ import annotations

import jinja2
import pytest

from training.common.templates import template_environment


def rendered(folder, name: str, text: str, **context) -> str:
    (folder / name).write_text(text)
    environment = template_environment(folder, loud=str.upper)
    return environment.get_template(name).render(**context)


def test_html_is_escaped_and_markdown_by_its_filters(tmp_path):
    hostile = "<b>|`x`_"
    assert rendered(tmp_path, "a.html.j2", "{{ x }}", x=hostile) == "&lt;b&gt;|`x`_"
    assert rendered(tmp_path, "b.md.j2", "{{ x }}", x=hostile) == hostile
    text = "{{ x | plain | cell }} {{ x | code | cell }}"
    assert rendered(tmp_path, "c.md.j2", text, x=hostile) == r"\<b\>\|\`x\`\_ ``<b>\|`x`_``"


def test_lines_of_blocks_leave_no_trace_and_further_filters_are_known(tmp_path):
    text = (
        "{% for x in [1, 2] %}\n- {{ x }}\n  {% if x == 2 %}\n{{ 'two' | loud }}\n  {% endif %}\n"
    )
    assert rendered(tmp_path, "a.md.j2", text + "{% endfor %}\nend\n") == "- 1\n- 2\nTWO\nend\n"


@pytest.mark.parametrize("text", ["{{ x }}", "{{ {}.x }}", "{% if x %}{% endif %}"])
def test_undefined_name_is_an_error(tmp_path, text):
    with pytest.raises(jinja2.UndefinedError, match="x"):
        rendered(tmp_path, "a.md.j2", text)
