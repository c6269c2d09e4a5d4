//! A look at page headers before the Parquet crate reads them.
//!
//! That crate skips what it does not know by the counts that a header states, past the end of the file
//! if need be: a few bytes keep it busy for many seconds, or have it allocate any amount. So every header
//! is walked here first, and one that states more than its chunk can hold is refused; and where the crate
//! finds its pages elsewhere, [`Ending`] stops it at the end of the file.
//!
//! Headers are structs in Thrift's compact protocol:
//! <https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md>.

use std::io::{Error, ErrorKind, Read};

use bytes::Bytes;
use parquet::errors::Result as ParquetResult;
use parquet::file::reader::{ChunkReader, Length};

/// Headers are small; only long statistics reach beyond this.
const FIRST_LOOK: usize = 1 << 12;
/// Structs, lists and maps inside one another.
const MAX_DEPTH: u32 = 64;

/// A file whose end is an error to whoever reads there. That crate takes it for nothing to skip, and goes on
/// to the next of the thousand millions that a list states.
pub(super) struct Ending<R>(pub(super) R);

/// What is read from such a file.
pub(super) struct EndingRead<T>(T);

impl<R: Length> Length for Ending<R> {
    fn len(&self) -> u64 {
        self.0.len()
    }
}

impl<R: ChunkReader> ChunkReader for Ending<R> {
    type T = EndingRead<R::T>;

    fn get_read(&self, start: u64) -> ParquetResult<Self::T> {
        self.0.get_read(start).map(EndingRead)
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        self.0.get_bytes(start, length)
    }
}

impl<T: Read> Read for EndingRead<T> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self.0.read(buffer) {
            Ok(0) if !buffer.is_empty() => Err(Error::new(
                ErrorKind::UnexpectedEof,
                "the file ends within a page",
            )),
            other => other,
        }
    }
}

/// Why a header was not read to its end.
#[derive(Debug, PartialEq, Eq)]
enum Fault {
    /// It goes on past the bytes at hand.
    Short,
    /// It states more than could be there.
    Hostile,
    /// It is no header.
    Other,
}

/// Walks the pages of a column chunk.
///
/// # Errors
/// Says where a header is none, or states a list, map or text longer than the chunk.
pub(super) fn check(input: &impl ChunkReader, start: u64, end: u64) -> Result<(), String> {
    let mut at = start;
    while at < end {
        match page(input, at, end) {
            Ok(next) => at = next,
            // The crate would read on behind the chunk, and behind the file.
            Err(Fault::Hostile | Fault::Short) => {
                return Err(format!(
                    "the page header at byte {at} states more than its column chunk can hold"
                ));
            }
            // The crate might find a way to read it, and go on anywhere.
            Err(Fault::Other) => return Err(format!("there is no page header at byte {at}")),
        }
    }
    Ok(())
}

/// Where the page after the one at `at` begins.
fn page(input: &impl ChunkReader, at: u64, end: u64) -> Result<u64, Fault> {
    let mut look = FIRST_LOOK as u64;
    loop {
        let length = look.min(end - at);
        let bytes = input
            .get_bytes(at, length as usize)
            .map_err(|_| Fault::Other)?;
        let mut walk = Walk {
            bytes: &bytes,
            at: 0,
            // What may still follow beyond the bytes at hand.
            beyond: end - at - length,
        };
        match walk.header() {
            Ok(compressed) => return Ok(at + walk.at as u64 + compressed),
            Err(Fault::Short) if length < end - at => look *= 16,
            Err(fault) => return Err(fault),
        }
    }
}

struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
    beyond: u64,
}

impl Walk<'_> {
    /// Reads a page header; gives the length of what follows it.
    fn header(&mut self) -> Result<u64, Fault> {
        let (mut id, mut compressed) = (0, None);
        while let Some((kind, delta)) = self.field()? {
            id = match delta {
                0 => self.zigzag()?,
                delta => id + i64::from(delta),
            };
            // `compressed_page_size`, an i32.
            if id == 3 && kind == 5 {
                compressed = u64::try_from(self.zigzag()?).ok();
            } else {
                self.skip(kind, 0)?;
            }
        }
        compressed.ok_or(Fault::Other)
    }

    /// The next field's type and the step of its number (0: the number follows), or the struct's end.
    fn field(&mut self) -> Result<Option<(u8, u8)>, Fault> {
        let byte = self.byte()?;
        Ok((byte & 0x0f != 0).then_some((byte & 0x0f, byte >> 4)))
    }

    fn byte(&mut self) -> Result<u8, Fault> {
        let byte = *self.bytes.get(self.at).ok_or(Fault::Short)?;
        self.at += 1;
        Ok(byte)
    }

    fn varint(&mut self) -> Result<u64, Fault> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        // The crate reads on; nothing sane is so long.
        Err(Fault::Hostile)
    }

    fn zigzag(&mut self) -> Result<i64, Fault> {
        let n = self.varint()?;
        Ok((n >> 1) as i64 ^ -((n & 1) as i64))
    }

    /// Checks that `n` things of a byte or more may still follow.
    fn fits(&self, n: u64) -> Result<(), Fault> {
        let left = (self.bytes.len() - self.at) as u64 + self.beyond;
        if n <= left {
            Ok(())
        } else {
            Err(Fault::Hostile)
        }
    }

    fn advance(&mut self, n: u64) -> Result<(), Fault> {
        self.fits(n)?;
        let to = self
            .at
            .saturating_add(usize::try_from(n).map_err(|_| Fault::Hostile)?);
        if to > self.bytes.len() {
            return Err(Fault::Short);
        }
        self.at = to;
        Ok(())
    }

    fn skip(&mut self, kind: u8, depth: u32) -> Result<(), Fault> {
        if depth > MAX_DEPTH {
            return Err(Fault::Hostile);
        }
        match kind {
            // A flag lies in the field's own byte.
            1 | 2 => Ok(()),
            3 => self.advance(1),
            4..=6 => self.varint().map(drop),
            7 => self.advance(8),
            8 => {
                let length = self.varint()?;
                self.advance(length)
            }
            9 | 10 => {
                let byte = self.byte()?;
                let count = match byte >> 4 {
                    15 => self.varint()?,
                    n => u64::from(n),
                };
                // No page header has a list of flags; the crate would count them without reading.
                if matches!(byte & 0x0f, 1 | 2) && count > 0 {
                    return Err(Fault::Hostile);
                }
                self.fits(count)?;
                for _ in 0..count {
                    self.skip(byte & 0x0f, depth + 1)?;
                }
                Ok(())
            }
            // No page header has a map.
            11 => match self.varint()? {
                0 => Ok(()),
                _ => Err(Fault::Hostile),
            },
            12 => {
                while let Some((kind, delta)) = self.field()? {
                    if delta == 0 {
                        self.zigzag()?;
                    }
                    self.skip(kind, depth + 1)?;
                }
                Ok(())
            }
            _ => Err(Fault::Other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header of page type 0, sizes 9 and 9, then `more`, then its end.
    fn header(more: &[u8]) -> bytes::Bytes {
        let mut all = vec![0x15, 0, 0x15, 18, 0x15, 18];
        all.extend_from_slice(more);
        all.extend_from_slice(&[0; 10]);
        all.into()
    }

    fn refused(more: &[u8]) -> bool {
        let file = header(more);
        check(&file, 0, file.len() as u64).is_err()
    }

    #[test]
    fn headers_that_state_more_than_there_is_are_refused() {
        assert!(!refused(&[]));
        // Field 8: a list of three i32; of 2³¹ flags; of 2³¹ doubles; text of 2⁴⁰ bytes; a map.
        assert!(!refused(&[0x59, 0x35, 1, 2, 3]));
        assert!(refused(&[0x59, 0xf1, 0xff, 0xff, 0xff, 0xff, 7]));
        assert!(refused(&[0x59, 0xf7, 0xff, 0xff, 0xff, 0xff, 7]));
        assert!(refused(&[0x58, 0x80, 0x80, 0x80, 0x80, 0x80, 0x20]));
        assert!(refused(&[0x5b, 0xff, 0xff, 0xff, 0xff, 7, 0x11]));
        // Lists of a few lists of a few …: little each, much together, all behind the end.
        assert!(refused(&[0x59, 0xe9, 0xe9, 0xe9, 0xe9, 0xe9, 0xe7]));
        // Lists in lists in lists.
        assert!(refused(&[[0x59].as_slice(), &[0x19; 90]].concat()));
        // Two pages: the second begins where the first's nine bytes end.
        let two = [
            header(&[]).as_ref(),
            &header(&[0x59, 0xf1, 0xff, 0xff, 0x7f]),
        ]
        .concat();
        let e = check(&bytes::Bytes::from(two), 0, 37).unwrap_err();
        assert!(e.contains("byte 16"), "{e}");
    }

    #[test]
    fn what_is_no_header_is_refused() {
        // A field of type 13, which is none; no size of what follows.
        assert!(refused(&[0x5d, 1]));
        let none = bytes::Bytes::from(vec![0x15, 0, 0x15, 18, 0, 0]);
        let e = check(&none, 0, 6).unwrap_err();
        assert!(e.contains("no page header at byte 0"), "{e}");
    }

    #[test]
    fn the_end_is_an_error() {
        let file = Ending(bytes::Bytes::from_static(b"abc"));
        let mut read = file.get_read(1).unwrap();
        let mut two = [0; 2];
        read.read_exact(&mut two).unwrap();
        assert_eq!(&two, b"bc");
        assert_eq!(read.read(&mut []).unwrap(), 0);
        assert_eq!(
            read.read(&mut two).unwrap_err().kind(),
            ErrorKind::UnexpectedEof
        );
    }

    #[test]
    fn long_statistics_are_read_whole() {
        // Field 8: text of 10,000 bytes, longer than the first look.
        let mut more = vec![0x58, 0x90, 0x4e];
        more.resize(3 + 10_000, b'x');
        assert!(!refused(&more));
        assert!(refused(&[0x58, 0x90, 0x4e]));
    }
}
