"""Settings of the documentation, which `python -m sphinx -W docs site` builds.

Everything is built and read offline: the theme is Sphinx's own, and formulas
become MathML, which browsers draw by themselves.
"""

import ast
import functools
import importlib
import inspect
import pathlib
import pkgutil
import re
import sys
import types

from docutils import nodes
from docutils import statemachine
from docutils.utils.math import latex2mathml
from sphinx.ext import autosummary

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import powerprop_jax

project = 'powerprop_jax'
author = 'the authors of powerprop_jax'
version = release = powerprop_jax.__version__

extensions = [
  'myst_parser',
  'sphinx.ext.autodoc',
  'sphinx.ext.autosummary',
  'sphinx.ext.napoleon',
  'sphinx.ext.viewcode',
]
myst_enable_extensions = ['deflist', 'dollarmath']
myst_heading_anchors = 3

# Summaries only list names: other pages describe the objects.
autosummary_generate = False

# Names between single backticks become links if the reference describes them.
default_role = 'py:obj'
add_module_names = False
autodoc_member_order = 'bysource'
autodoc_preserve_defaults = True
autodoc_typehints_format = 'short'
autodoc_default_options = {'members': True}
python_maximum_signature_line_length = 76
napoleon_numpy_docstring = False
# Fields are a list inside the class, or Sphinx would list them a second time.
napoleon_use_ivar = True
napoleon_use_rtype = False
smartquotes_action = 'D'  # Only dashes: the prime of psi'(phi) is no quote.

html_theme = 'alabaster'
html_theme_options = {
  'description': 'Weights that prune themselves while they learn',
  'page_width': '1220px',
  'sidebar_width': '250px',
  'body_max_width': '940px',
  'fixed_sidebar': True,
  'font_family': 'system-ui, sans-serif',
  'head_font_family': 'system-ui, sans-serif',
  'show_powered_by': False,
}
html_show_copyright = False
html_static_path = ['_static']
html_css_files = ['wide.css']
html_math_renderer = 'mathml'


@functools.cache
def _arguments(module):
  """The names of all arguments in a module."""
  source = inspect.getsource(importlib.import_module(module))
  return {x.arg for x in ast.walk(ast.parse(source)) if isinstance(x, ast.arg)}


def _modules(match):
  """A section for every module of a package."""
  names = [
    f'{match[1]}.{module.name}'
    for module in pkgutil.iter_modules(
      importlib.import_module(match[1]).__path__
    )
    if not module.ispkg
  ]
  return '\n'.join(
    f'## `{name.removeprefix("powerprop_jax.")}`\n\n'
    f'```{{eval-rst}}\n.. automodule:: {name}\n```\n'
    for name in names
  )


def _programs(match):
  """A section for every program of a folder, with its code."""
  folder = pathlib.Path(__file__).parent.parent / match[1]
  return '\n'.join(
    f'## `{path.stem}`\n\n'
    f'{ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]}\n\n'
    f'```bash\npython -m {match[1]}.{path.stem}\n```\n\n'
    f'```{{literalinclude}} ../{match[1]}/{path.name}\n'
    ':language: python\n```\n'
    for path in sorted(folder.glob('*.py'))
  )


def _expand(app, docname, source):
  """Replaces the comments of a page that ask for modules or programs.

  Whatever is in the package or in the folder is listed, so none is forgotten.
  """
  del app, docname
  for kind, sections in ('modules', _modules), ('programs', _programs):
    source[0] = re.sub(rf'<!-- {kind}: (\S+) -->', sections, source[0])


def _as_restructured_text(app, what, name, obj, options, lines):
  """Escapes docstrings, which are plain text with backticks.

  |phi| is no substitution there, and * marks no emphasis.
  """
  del app, what, name, obj, options
  # Examples stay what they are: each from its prompt to the next empty line.
  parts = re.split(r'((?:^|\n) *>>> (?:.+\n?)+)', '\n'.join(lines))
  parts[::2] = map(_escape, parts[::2])
  lines[:] = ''.join(parts).split('\n')


def _escape(text):
  """Text that is not an example, with its special characters escaped."""
  parts = re.split(r'(`[^`]*`_*)', text)
  parts[::2] = [re.sub(r'([|*])(?! )', r'\\\1', x) for x in parts[::2]]
  text = re.sub(r'`(?=[a-z])(?<=\w`)', r'`\\ ', ''.join(parts))
  # Napoleon takes the words before a colon for a type.
  text = re.sub(r'(Returns:\n +)', r'\1: ', text)
  # The same reference may occur in several docstrings of a page.
  return re.sub(r'>`_(?!_)', '>`__', text)


class _Exports(autosummary.Autosummary):
  """Lists what a package exports, with links to where it is described."""

  has_content = False
  required_arguments = 1

  def run(self):
    (package,) = self.arguments
    module = importlib.import_module(package)
    names = [
      f'~{package}.{name}'
      for name in module.__all__
      if not isinstance(getattr(module, name), types.ModuleType)
    ]
    self.content = statemachine.StringList(names, package)
    self.options['nosignatures'] = None
    # The package itself has no page: names of it link to this list.
    text = (
      f'.. py:module:: {package}\n\n.. py:currentmodule:: None\n\n'
      f'These names are taken from ``{package}``:'
    )
    return [
      *self.parse_text_to_nodes(text),
      *super().run(),
    ]


def _value(name):
  """The object of a dotted name; None if there is no such object."""
  parts = name.split('.')
  for i in range(len(parts), 0, -1):
    try:
      found = importlib.import_module('.'.join(parts[:i]))
    except ImportError:
      continue
    return functools.reduce(
      lambda x, part: getattr(x, part, None), parts[i:], found
    )
  return None


def _candidates(objects, target):
  """The objects that a name can mean, whose first parts it may leave out."""
  parts = target.split('.')
  found = [
    name
    for name in objects
    if name.split('.')[-1] == parts[-1] and set(parts) <= set(name.split('.'))
  ]
  if len(found) > 1:  # A function comes before the module of its name.
    found = [x for x in found if objects[x].objtype != 'module']
  if len(found) > 1:  # Several modules have the name: which object is it?
    value = _value(target)
    found = [x for x in found if value is not None and _value(x) is value]
  return found


def _find(app, env, node, contnode):
  """Links a name to the object that it can only mean.

  A docstring says `masks.topk_mask`, or `powerprop_jax.topk_mask` for what the
  package exports; the object is powerprop_jax.sparse.masks.topk_mask. A call is
  a link to what is called, and a field of a named tuple to its class.
  """
  if node.get('refdomain') != 'py':
    return None
  match = re.fullmatch(r'([A-Za-z_][\w.]*)(\(.*)?', node['reftarget'], re.S)
  if match is None:
    return None
  domain = env.get_domain('py')
  found = _candidates(domain.objects, match[1])
  if not found and '.' in match[1]:
    owners = _candidates(domain.objects, match[1].rpartition('.')[0])
    found = [x for x in owners if domain.objects[x].objtype == 'class']
  if len(found) != 1:
    return None
  here = node.get('py:module')
  is_module = domain.objects[found[0]].objtype == 'module'
  if is_module and here and match[1] in _arguments(here):
    return None  # In a docstring of it, such a word is the argument.
  return domain.resolve_xref(
    env, node['refdoc'], app.builder, 'obj', found[0], node, contnode
  )


def _skip(app, what, name, obj, skip, options):
  """Leaves out the fields of named tuples, which the class has described."""
  del app, what, name, options
  return skip or type(obj).__name__ == '_tuplegetter' or None


def _formula(translator, node):
  """Writes a formula as MathML."""
  block = isinstance(node, nodes.math_block)
  formula = latex2mathml.tex2mathml(node.astext(), as_block=block)
  translator.body.append(str(formula))
  raise nodes.SkipNode


def setup(app):
  """Registers the functions above."""
  app.connect('source-read', _expand)
  app.connect('autodoc-process-docstring', _as_restructured_text, priority=1)
  app.connect('autodoc-skip-member', _skip)
  app.connect('missing-reference', _find)
  app.add_directive('exports', _Exports)
  app.add_html_math_renderer(
    'mathml',
    inline_renderers=(_formula, None),
    block_renderers=(_formula, None),
  )
