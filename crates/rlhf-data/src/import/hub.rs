//! Repositories of the Hugging Face Hub, downloaded into its cache.
//!
//! Invariant: all files come from one commit; each has the size that the Hub states, and where it
//! states a digest (of large files), that digest. What was cut goes on where it stopped.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Component, Path, PathBuf};

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, Metadata};
use hf_hub::{Cache, Repo, RepoType};
use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};
use crate::source;

/// Where the Hub is and where its files are kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hub {
    /// Its address; else the environment's `HF_ENDPOINT`, else the public one.
    pub endpoint: Option<String>,
    /// The cache's folder; else the one under the environment's `HF_HOME`, else the usual one.
    pub cache: Option<PathBuf>,
}

/// What kind of repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RepoKind {
    /// A dataset.
    Dataset,
    /// A model.
    Model,
}

impl RepoKind {
    fn name(self) -> &'static str {
        match self {
            Self::Dataset => "dataset",
            Self::Model => "model",
        }
    }
}

/// Files of a repository at a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The commit.
    pub commit: String,
    /// The files in the cache, in the order of their names.
    pub files: Vec<PathBuf>,
}

impl Hub {
    /// Downloads the data files of a dataset, unless the cache has them: those that [`source::rows`]
    /// reads, and of them those whose name in the repository `pattern` matches (`data/train-*`).
    ///
    /// # Errors
    /// When the Hub cannot be reached, has no such dataset, revision or file, or what came is damaged.
    pub fn download(
        &self,
        dataset: &str,
        revision: &str,
        pattern: Option<&str>,
    ) -> Result<Snapshot> {
        let pattern = pattern.map(glob::Pattern::new).transpose();
        let pattern = pattern.map_err(|e| Error::Invalid {
            what: format!("no pattern: {e}"),
            mend: "correct the pattern".into(),
        })?;
        let wanted = |n: &str| is_data(n) && pattern.as_ref().is_none_or(|p| p.matches(n));
        let found = self.snapshot(RepoKind::Dataset, dataset, revision, &wanted)?;
        if found.files.is_empty() {
            return Err(Error::Invalid {
                what: format!("{dataset}: no data file of a known kind at {revision}"),
                mend: "check the pattern, or give a revision with Parquet, such as `refs/convert/parquet`".into(),
            });
        }
        Ok(found)
    }

    /// Downloads those files of a repository whose name there is `wanted`, unless the cache has them.
    ///
    /// # Errors
    /// When the Hub cannot be reached, has no such repository, revision or file, or what came is
    /// damaged.
    pub fn snapshot(
        &self,
        kind: RepoKind,
        repo: &str,
        revision: &str,
        wanted: &dyn Fn(&str) -> bool,
    ) -> Result<Snapshot> {
        // The client asserts in places that an odd answer reaches.
        catch_unwind(AssertUnwindSafe(|| {
            self.try_snapshot(kind, repo, revision, wanted)
        }))
        .unwrap_or_else(|_| Err(nonsense(repo)))
    }

    fn try_snapshot(
        &self,
        kind: RepoKind,
        repo: &str,
        revision: &str,
        wanted: &dyn Fn(&str) -> bool,
    ) -> Result<Snapshot> {
        let failed = |file: &str, e| failure(kind, repo, file, revision, e);
        let (api, cache) = self.client().map_err(|e| failed("", e))?;
        let at = |revision: &str| {
            let kind = match kind {
                RepoKind::Dataset => RepoType::Dataset,
                RepoKind::Model => RepoType::Model,
            };
            Repo::with_revision(repo.into(), kind, revision.into())
        };
        let info = api.repo(at(revision)).info().map_err(|e| failed("", e))?;
        // It becomes a folder's name.
        if !plain(&info.sha) {
            return Err(nonsense(repo));
        }
        let mut names: Vec<String> = info
            .siblings
            .into_iter()
            .map(|s| s.rfilename)
            .filter(|n| is_inside(n) && wanted(n))
            .collect();
        names.sort();
        let pinned = at(&info.sha);
        let (remote, kept) = (api.repo(pinned.clone()), cache.repo(pinned));
        let mut files = Vec::new();
        for name in names {
            files.push(match kept.get(&name) {
                Some(path) => path,
                None => {
                    let shown = format!("{repo}/{name}");
                    let told = api
                        .metadata(&remote.url(&name))
                        .map_err(|e| failed(&name, e))?;
                    if !plain(told.etag()) || told.commit_hash() != info.sha {
                        return Err(nonsense(&shown));
                    }
                    let get = || remote.download(&name).map_err(|e| failed(&name, e));
                    fetch(&shown, &told, &kept.blob_path(told.etag()), get)?
                }
            });
        }
        Ok(Snapshot {
            commit: info.sha,
            files,
        })
    }

    fn client(&self) -> std::result::Result<(Api, Cache), ApiError> {
        let cache = match &self.cache {
            Some(folder) => Cache::new(folder.clone()),
            None => Cache::from_env(),
        };
        let mut builder = ApiBuilder::from_env().with_progress(false).with_retries(3);
        if let Some(folder) = &self.cache {
            builder = builder
                .with_cache_dir(folder.clone())
                .with_token(cache.token());
        }
        if let Some(endpoint) = &self.endpoint {
            builder = builder.with_endpoint(endpoint.trim_end_matches('/').into());
        }
        Ok((builder.build()?, cache))
    }
}

/// Whether a name leads nowhere but into the folder that it is put in.
fn is_inside(name: &str) -> bool {
    Path::new(name)
        .components()
        .all(|c| matches!(c, Component::Normal(_)))
}

/// Whether a text of the Hub can be the name of a file or folder.
fn plain(name: &str) -> bool {
    !name.is_empty()
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
}

/// Whether a file of a repository holds rows.
fn is_data(name: &str) -> bool {
    let last = name.rsplit('/').next().unwrap_or(name);
    // What datasets say about themselves.
    let about = ["dataset_infos.json", "dataset_info.json", "state.json"].contains(&last);
    !about && !name.starts_with('.') && source::is_known(last)
}

/// Brings a file, and once more from its beginning where what came is not what the Hub told: the
/// first part may have come from an older try, or from a server that sends all when asked for the rest.
fn fetch(
    shown: &str,
    told: &Metadata,
    blob: &Path,
    get: impl Fn() -> Result<PathBuf>,
) -> Result<PathBuf> {
    // A part as long as the whole would be asked for its rest, which the server has not.
    let part = blob.with_extension("part");
    if part.metadata().is_ok_and(|m| m.len() >= told.size() as u64) {
        std::fs::remove_file(&part).map_err(Error::io(&part))?;
    }
    let path = get()?;
    if difference(&path, told)?.is_none() {
        return Ok(path);
    }
    remove(&path)?;
    let path = get()?;
    let Some(what) = difference(&path, told)? else {
        return Ok(path);
    };
    remove(&path)?;
    Err(Error::File {
        path: shown.into(),
        what: format!("what was downloaded {what}"),
        mend: "download it again; if that does not help, the hub or a proxy before it is at fault"
            .into(),
    })
}

/// Where a file is not what the Hub told, by its size or, for large ones, its digest.
fn difference(path: &Path, told: &Metadata) -> Result<Option<String>> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    let size = file.metadata().map_err(Error::io(path))?.len();
    if size != told.size() as u64 {
        let wanted = told.size();
        return Ok(Some(format!("has {size} bytes, the hub tells {wanted}")));
    }
    let digest = told.etag();
    if digest.len() != 64 || !digest.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(None);
    }
    let mut hash = Sha256::new();
    std::io::copy(&mut file, &mut hash).map_err(Error::io(path))?;
    let got: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    let same = got == digest.to_ascii_lowercase();
    Ok((!same).then(|| format!("has the SHA-256 digest {got}, the hub tells {digest}")))
}

/// Removes a file of the cache and what it points to.
fn remove(path: &Path) -> Result<()> {
    let blob = path.canonicalize().map_err(Error::io(path))?;
    for damaged in [path, &blob] {
        if damaged.symlink_metadata().is_ok() {
            std::fs::remove_file(damaged).map_err(Error::io(damaged))?;
        }
    }
    Ok(())
}

fn nonsense(what: &str) -> Error {
    Error::Invalid {
        what: format!("{what}: the answer of the hub makes no sense"),
        mend: "check the endpoint".into(),
    }
}

fn failure(kind: RepoKind, repo: &str, file: &str, revision: &str, e: ApiError) -> Error {
    let said = e.to_string();
    let kind = kind.name();
    let shown = match file {
        "" => repo.to_owned(),
        file => format!("{repo}/{file}"),
    };
    let status = |codes: [&str; 2]| codes.iter().any(|s| said.contains(&format!("status: {s}")));
    if status(["404", "410"]) {
        return Error::Invalid {
            what: format!("{shown}: no such {kind}, revision or file at {revision}: {said}"),
            mend: "check the name and the revision".into(),
        };
    }
    // The hub answers so for what does not exist too.
    if status(["401", "403"]) {
        return Error::Invalid {
            what: format!(
                "{shown}: no such {kind} at {revision}, or one that not everybody may read: {said}"
            ),
            mend: "check the name; for one that needs consent, give it on the hub's page and log in with `hf auth login`"
                .into(),
        };
    }
    let again = "run it again: what has come is kept";
    Error::Io {
        path: shown.into(),
        source: std::io::Error::other(format!("{said}; {again}")),
    }
}
