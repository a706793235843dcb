"""The README's Python, executed."""

import pathlib
import re

_README = pathlib.Path(__file__).parent.parent / 'README.md'


def test_python_blocks_run():
  blocks = re.findall(r'```python\n(.*?)```', _README.read_text(), re.DOTALL)
  assert len(blocks) == 3
  namespace = {}
  for block in blocks:  # One after another, as a reader would.
    exec(compile(block, str(_README), 'exec'), namespace)
  kept = namespace['theta']['mlp/~/linear_0']['w'] != 0
  assert 0 < int(kept.sum()) < 0.06 * 266_200
