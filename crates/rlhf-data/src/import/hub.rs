//! Datasets of the Hugging Face Hub, downloaded into its cache.
//!
//! Invariant: all files come from one commit, and a file whose digest the Hub tells is compared with it.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Component, Path, PathBuf};

use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
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

/// The files of a dataset at a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The commit.
    pub commit: String,
    /// The data files in the cache, in the order of their names.
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
        // The client asserts in places that an odd answer reaches.
        catch_unwind(AssertUnwindSafe(|| {
            self.try_download(dataset, revision, pattern)
        }))
        .unwrap_or_else(|_| {
            Err(Error::Invalid {
                what: format!("{dataset}: the answer of the hub makes no sense"),
                mend: "check the endpoint".into(),
            })
        })
    }

    fn try_download(
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
        let failed = |e: ApiError| failure(dataset, revision, e);
        let (api, cache) = self.client().map_err(failed)?;
        let at = |revision: &str| {
            Repo::with_revision(dataset.into(), RepoType::Dataset, revision.into())
        };
        let info = api.repo(at(revision)).info().map_err(failed)?;
        let mut names: Vec<String> = info
            .siblings
            .into_iter()
            .map(|s| s.rfilename)
            .filter(|n| is_data(n) && pattern.as_ref().is_none_or(|p| p.matches(n)))
            .collect();
        names.sort();
        if names.is_empty() {
            return Err(Error::Invalid {
                what: format!("{dataset}: no data file of a known kind at {revision}"),
                mend: "check the pattern, or give a revision with Parquet, such as `refs/convert/parquet`".into(),
            });
        }
        let pinned = at(&info.sha);
        let (repo, kept) = (api.repo(pinned.clone()), cache.repo(pinned));
        let mut files = Vec::new();
        for name in names {
            files.push(match kept.get(&name) {
                Some(path) => path,
                None => {
                    let path = repo.download(&name).map_err(failed)?;
                    compare(&path)?;
                    path
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

/// Whether a file of a repository holds rows; one whose name leads out of the cache is left alone.
fn is_data(name: &str) -> bool {
    let inside = Path::new(name)
        .components()
        .all(|c| matches!(c, Component::Normal(_)));
    let last = name.rsplit('/').next().unwrap_or(name);
    // What datasets say about themselves.
    let about = ["dataset_infos.json", "dataset_info.json", "state.json"].contains(&last);
    inside && !about && !name.starts_with('.') && source::is_known(last)
}

/// Compares a large file with its digest, by which the cache names it; what is damaged is removed.
fn compare(path: &Path) -> Result<()> {
    let blob = path.canonicalize().map_err(Error::io(path))?;
    let name = blob
        .file_name()
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default();
    if name.len() != 64 || !name.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(());
    }
    let mut hash = Sha256::new();
    let mut file = File::open(&blob).map_err(Error::io(path))?;
    std::io::copy(&mut file, &mut hash).map_err(Error::io(path))?;
    let got: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    if got == name.to_ascii_lowercase() {
        return Ok(());
    }
    for damaged in [path, &blob] {
        if damaged.symlink_metadata().is_ok() {
            std::fs::remove_file(damaged).map_err(Error::io(damaged))?;
        }
    }
    Err(Error::file(
        path,
        "what was downloaded has another digest than the hub tells",
        "download it again",
    ))
}

fn failure(dataset: &str, revision: &str, e: ApiError) -> Error {
    let said = e.to_string();
    // The hub answers 401 for what does not exist too.
    if ["401", "403", "404"]
        .iter()
        .any(|s| said.contains(&format!("status: {s}")))
    {
        return Error::Invalid {
            what: format!(
                "{dataset}: no such dataset, revision or file at {revision}, or it is not public: {said}"
            ),
            mend: "check the name and the revision; for one that needs consent, log in to the hub"
                .into(),
        };
    }
    Error::Io {
        path: dataset.into(),
        source: std::io::Error::other(e),
    }
}
