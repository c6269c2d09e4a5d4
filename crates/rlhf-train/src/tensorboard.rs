//! TensorBoard event files: scalars only.
//!
//! A file is a sequence of TFRecords (length, masked CRC-32C of the length, data, masked CRC-32C of the
//! data), each an `Event` protocol buffer. A file that continues a run begins by telling TensorBoard to
//! forget what earlier files hold from that step on: those steps were lost, and are done again.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};

/// Writes an event file.
#[derive(Debug)]
pub(crate) struct EventWriter {
    path: PathBuf,
    file: BufWriter<File>,
}

impl EventWriter {
    /// Begins a new file in `dir`; `first_step` tells it from those of earlier runs.
    pub(crate) fn create(dir: &Path, first_step: u64) -> Result<Self> {
        std::fs::create_dir_all(dir).map_err(Error::write(dir))?;
        let path = dir.join(format!(
            "events.out.tfevents.{:010}.{first_step:010}.rlhf",
            now() as u64
        ));
        let file = BufWriter::new(File::create(&path).map_err(Error::write(&path))?);
        let mut writer = Self { path, file };
        writer.record(&event(0, Content::Version))?;
        if first_step > 0 {
            writer.record(&event(first_step, Content::Restart))?;
        }
        Ok(writer)
    }

    pub(crate) fn scalar(&mut self, step: u64, tag: &str, value: f64) -> Result<()> {
        self.record(&event(step, Content::Scalar(tag, value as f32)))
    }

    pub(crate) fn flush(&mut self) -> Result<()> {
        self.file.flush().map_err(Error::write(&self.path))
    }

    fn record(&mut self, data: &[u8]) -> Result<()> {
        let length = (data.len() as u64).to_le_bytes();
        let mut out = Vec::with_capacity(data.len() + 16);
        out.extend(length);
        out.extend(masked_crc(&length).to_le_bytes());
        out.extend(data);
        out.extend(masked_crc(data).to_le_bytes());
        self.file.write_all(&out).map_err(Error::write(&self.path))
    }
}

enum Content<'a> {
    Version,
    Restart,
    Scalar(&'a str, f32),
}

fn now() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |d| d.as_secs_f64())
}

/// `Event { wall_time = 1, step = 2, file_version = 3, summary = 5, session_log = 7 }`.
fn event(step: u64, content: Content<'_>) -> Vec<u8> {
    let mut out = vec![0x09];
    out.extend(now().to_le_bytes());
    out.push(0x10);
    varint(step, &mut out);
    match content {
        Content::Version => bytes(0x1a, b"brain.Event:2", &mut out),
        // SessionLog { status = 1: START = 1 }
        Content::Restart => bytes(0x3a, &[0x08, 0x01], &mut out),
        Content::Scalar(tag, value) => {
            // Summary { value = 1: Value { tag = 1, simple_value = 2 } }
            let mut v = Vec::new();
            bytes(0x0a, tag.as_bytes(), &mut v);
            v.push(0x15);
            v.extend(value.to_le_bytes());
            let mut summary = Vec::new();
            bytes(0x0a, &v, &mut summary);
            bytes(0x2a, &summary, &mut out);
        }
    }
    out
}

fn bytes(key: u8, data: &[u8], out: &mut Vec<u8>) {
    out.push(key);
    varint(data.len() as u64, out);
    out.extend(data);
}

fn varint(mut n: u64, out: &mut Vec<u8>) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

fn masked_crc(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), bit by bit: event files are small.
fn crc32c(data: &[u8]) -> u32 {
    !data.iter().fold(!0u32, |crc, &b| {
        (0..8).fold(crc ^ u32::from(b), |c, _| {
            if c & 1 == 1 {
                c >> 1 ^ 0x82f6_3b78
            } else {
                c >> 1
            }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc_known_answer() {
        // The check value of CRC-32C.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    /// The records of a file, whose checksums must be right.
    fn records(data: &[u8]) -> Vec<Vec<u8>> {
        let (mut rest, mut records) = (data, Vec::new());
        while !rest.is_empty() {
            let n = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(masked_crc(&rest[..8]).to_le_bytes(), rest[8..12]);
            assert_eq!(
                masked_crc(&rest[12..12 + n]).to_le_bytes(),
                rest[12 + n..16 + n]
            );
            records.push(rest[12..12 + n].to_vec());
            rest = &rest[16 + n..];
        }
        records
    }

    #[test]
    fn events_can_be_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut w = EventWriter::create(dir.path(), 0).unwrap();
        w.scalar(300, "sft/loss", 1.5).unwrap();
        w.flush().unwrap();
        let records = records(&std::fs::read(&w.path).unwrap());
        assert_eq!(records.len(), 2);
        // After the time: step 0, then the version.
        assert_eq!(&records[0][9..], b"\x10\x00\x1a\x0dbrain.Event:2");
        // Step 300 = 0xac 0x02; summary of 17 bytes, value of 15, tag of 8 bytes, 1.5 as f32.
        let expected = b"\x10\xac\x02\x2a\x11\x0a\x0f\x0a\x08sft/loss\x15\x00\x00\xc0\x3f";
        assert_eq!(&records[1][9..], expected);
    }

    #[test]
    fn a_resumed_run_takes_back_what_was_lost() {
        let dir = tempfile::tempdir().unwrap();
        let mut w = EventWriter::create(dir.path(), 5).unwrap();
        w.flush().unwrap();
        let records = records(&std::fs::read(&w.path).unwrap());
        // Step 5, session_log { status: START }.
        assert_eq!(&records[1][9..], b"\x10\x05\x3a\x02\x08\x01");
        // Readers take the files by name: those of one second must be in the order of their steps.
        let later = EventWriter::create(dir.path(), 40).unwrap();
        assert!(w.path < later.path);
    }
}
