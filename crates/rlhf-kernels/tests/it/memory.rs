//! Tensors from malloc itself.
#![cfg(all(target_os = "linux", target_env = "gnu"))]

use rlhf_kernels::layer::embedding;
use rlhf_kernels::optim::{AdamW, AdamWConfig};
use tch::{Device, Kind, Tensor};

/// MiB that the process has, in pages that belong to no file.
fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("RssAnon")).unwrap();
    let kib: f64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib / 1024.0
}

/// Gradient and moments of a table take memory for the rows that were looked up.
#[test]
fn a_table_takes_memory_by_rows() {
    let table = Tensor::ones([100_000, 256], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let ids = Tensor::arange(40, (Kind::Int64, Device::Cpu)) * 2000;
    let before = resident();
    let mut adamw = AdamW::new(
        vec![("table".into(), table.shallow_clone())],
        AdamWConfig::default(),
    );
    for _ in 0..3 {
        adamw.zero_grad();
        let rows = embedding(&table, &ids).unwrap();
        rows.sum(Kind::Float).backward();
        adamw.step(0.1).unwrap();
    }
    let grown = resident() - before;
    assert!(grown < 30.0, "{grown} MiB, where a table has 98");
    assert!(table.double_value(&[2000, 7]) < 0.8);
    assert_eq!(table.double_value(&[2001, 7]), 1.0);
}

#[test]
fn a_tensor_fits_where_one_of_its_size_was() {
    rlhf_kernels::keep_memory();
    let options = (Kind::Float, Device::Cpu);
    let n = 300_000;
    let all: Vec<Tensor> = (0..9).map(|i| Tensor::full([n], i, options)).collect();
    assert!(
        all.iter()
            .all(|t| (t.data_ptr() as usize).is_multiple_of(64))
    );
    let mut places: Vec<_> = all.iter().map(Tensor::data_ptr).collect();
    // Every second one is freed, so that no hole can grow into another.
    let (kept, freed): (Vec<_>, Vec<_>) =
        all.into_iter().enumerate().partition(|(i, _)| i % 2 == 0);
    drop(freed);
    let again: Vec<Tensor> = (0..4).map(|_| Tensor::full([n], -1, options)).collect();
    places.retain(|p| again.iter().all(|t| t.data_ptr() != *p));
    // Beside the first there may have been a hole before, and the two are one now, which begins elsewhere.
    assert!(
        places.len() <= 6,
        "the holes are not filled: {}",
        places.len()
    );
    for (i, t) in &kept {
        assert_eq!(
            t.sum(Kind::Double).double_value(&[]),
            (*i as i64 * n) as f64
        );
    }
    let empty = Tensor::zeros([0, 3], options);
    assert_eq!(Tensor::cat(&[&empty, &empty], 0).size(), [0, 3]);
}

#[test]
fn too_much_is_an_error() {
    rlhf_kernels::keep_memory();
    for n in [1 << 45, 1 << 60] {
        let e = Tensor::f_zeros([n], (Kind::Float, Device::Cpu)).unwrap_err();
        assert!(e.to_string().contains("not enough memory"), "{e}");
    }
}
