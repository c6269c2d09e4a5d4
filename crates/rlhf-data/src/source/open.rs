//! Opening text files, packed or not.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use flate2::read::MultiGzDecoder;

use crate::error::{Error, Result};

/// The longest row read: a longer one is refused, so memory stays bounded whatever the file holds.
pub(super) const MAX_LINE: u64 = 64 << 20;

/// How a file is packed, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    Plain,
    Gzip,
    Zstd,
}

impl Packing {
    /// The packing of a name, and the name without it.
    pub(super) fn of(name: &str) -> (Self, &str) {
        if let Some(plain) = name.strip_suffix(".gz") {
            (Self::Gzip, plain)
        } else if let Some(plain) = name.strip_suffix(".zst") {
            (Self::Zstd, plain)
        } else {
            (Self::Plain, name)
        }
    }
}

/// The unpacked bytes of a file.
pub(super) fn text(path: &Path, packing: Packing) -> Result<Box<dyn BufRead + Send>> {
    let mut file = BufReader::new(File::open(path).map_err(Error::io(path))?);
    let start = file.fill_buf().map_err(Error::io(path))?;
    let expected = |magic: &[u8], name: &str, ending: &str| {
        if start.starts_with(magic) {
            return Ok(());
        }
        Err(Error::file(
            path,
            format!("not {name}, although its name ends with {ending}"),
            format!("remove the {ending} or compress it"),
        ))
    };
    Ok(match packing {
        Packing::Plain => Box::new(file),
        Packing::Gzip => {
            expected(&[0x1f, 0x8b], "gzip", ".gz")?;
            Box::new(BufReader::new(MultiGzDecoder::new(file)))
        }
        Packing::Zstd => {
            // A frame, or one to be skipped before it.
            if !(start.len() > 3
                && (0x50..=0x5f).contains(&start[0])
                && start[1..4] == *b"\x2a\x4d\x18")
            {
                expected(&[0x28, 0xb5, 0x2f, 0xfd], "zstd", ".zst")?;
            }
            let decoder = zstd::Decoder::with_buffer(file).map_err(Error::io(path))?;
            Box::new(BufReader::new(decoder))
        }
    })
}
