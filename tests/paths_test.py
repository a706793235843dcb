"""Tests that paths are resolved, and no address becomes a local folder."""

import os
import pathlib
import sys

import pytest

from powerprop_jax import paths


def test_local_paths(monkeypatch):
  monkeypatch.setenv('HOME', '/somewhere')
  assert os.fspath(paths.resolve('~')) == '/somewhere'
  assert os.fspath(paths.resolve('~/a/b')) == '/somewhere/a/b'
  assert os.fspath(paths.resolve(pathlib.Path('~', 'a'))) == '/somewhere/a'
  assert os.fspath(paths.resolve('a/~/b')) == 'a/~/b'
  assert os.fspath(paths.resolve('/a')) == '/a'


@pytest.mark.parametrize(
  ('path', 'missing', 'message'),
  [
    ('gs://bucket/a', 'gcsfs', 'gs://bucket/a.*install gcsfs'),
    ('s3://bucket', 's3fs', "'s3://bucket'.*nstall s3fs"),
    ('ftp://host/a', '', "'ftp://host/a' is an address of an unknown kind"),
    ('https://host', '', 'unknown kind'),
    (pathlib.PurePosixPath('gs://bucket'), '', "'gs:/bucket' has one slash"),
    ('~nobody_of_this_name/a', '', 'no such user'),
  ],
)
def test_addresses_that_cannot_be_read(monkeypatch, path, missing, message):
  if missing:
    monkeypatch.setitem(sys.modules, missing, None)
  with pytest.raises(ValueError, match=message):
    paths.resolve(path)
