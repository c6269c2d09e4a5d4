//! A layer's small operations: their gradients by finite differences, and against libtorch's composition.

use proptest::prelude::*;
use rlhf_kernels::layer::{
    add_norm, embedding, linears, norm_linears, rotate, silu_mul, silu_mul_linear,
};
use rlhf_kernels::reference;
use tch::{Device, Kind, Tensor};

use crate::device::device;
use crate::gradcheck::check;
use crate::{cpu_wave as wave, largest_difference};

fn double(size: &[i64], seed: f64) -> Tensor {
    wave(size, seed, Kind::Double)
}

#[test]
fn gradients() {
    let (x, more, w) = (
        double(&[3, 5], 1.0),
        double(&[3, 5], 2.0),
        double(&[5], 3.0),
    );
    let both = |(x, y): (Tensor, Tensor)| Tensor::cat(&[x * 0.7, y], 0);
    check("norm", &[x.copy(), w.copy()], &|t| {
        both(add_norm(&t[0], None, &t[1], 1e-5).unwrap())
    });
    check("norm alone", &[x.copy(), w.copy()], &|t| {
        add_norm(&t[0], None, &t[1], 1e-5).unwrap().1
    });
    check("add and norm", &[x.copy(), more.copy(), w.copy()], &|t| {
        both(add_norm(&t[0], Some(&t[1]), &t[2], 1e-5).unwrap())
    });
    let frozen = w;
    check("norm, frozen weight", &[x.copy()], &|t| {
        both(add_norm(&t[0], None, &frozen, 1e-5).unwrap())
    });
    let ids = Tensor::from_slice(&[2i64, 0, 2, 2, 1]);
    check("embedding", &[x.copy()], &|t| {
        embedding(&t[0], &ids).unwrap()
    });
    let (gate, up) = (double(&[4, 6], 4.0) * 3.0, double(&[4, 6], 5.0));
    check("silu_mul", &[gate.copy(), up.copy()], &|t| {
        silu_mul(&t[0], &t[1]).unwrap()
    });
    let down = double(&[3, 6], 10.0);
    check(
        "silu_mul_linear",
        &[gate.copy(), up.copy(), down.copy()],
        &|t| silu_mul_linear(&t[0], &t[1], &t[2]).unwrap(),
    );
    check("silu_mul_linear, frozen weight", &[gate, up], &|t| {
        silu_mul_linear(&t[0], &t[1], &down).unwrap()
    });
    let heads = double(&[3, 2, 8], 6.0);
    for turning in [8, 4] {
        let angle = double(&[3, 1, turning], 7.0) * 3.0;
        let (cos, sin) = (angle.cos(), angle.sin());
        check(&format!("rotate {turning}"), &[heads.copy()], &|t| {
            rotate(&t[0], &cos, &sin).unwrap()
        });
    }
    let weights = [double(&[4, 5], 8.0), double(&[2, 5], 9.0)];
    check(
        "linears",
        &[x.copy(), weights[0].copy(), weights[1].copy()],
        &|t| {
            let out = linears(&t[0], &[&t[1], &t[2]]).unwrap();
            Tensor::cat(&out, 1)
        },
    );
    let [first, second] = &weights;
    check("linears, one frozen", &[x.copy(), first.copy()], &|t| {
        let out = linears(&t[0], &[&t[1], second]).unwrap();
        Tensor::cat(&out, 1)
    });
    let all = |(x, y): (Tensor, Vec<Tensor>)| Tensor::cat(&[x * 0.7, Tensor::cat(&y, 1)], 1);
    check(
        "norm_linears",
        &[x.copy(), frozen.copy(), first.copy(), second.copy()],
        &|t| all(norm_linears(&t[0], None, &t[1], 1e-5, &[&t[2], &t[3]]).unwrap()),
    );
    check(
        "norm_linears of a sum, the norm and a weight frozen",
        &[x.copy(), more.copy(), second.copy()],
        &|t| all(norm_linears(&t[0], Some(&t[1]), &frozen, 1e-5, &[first, &t[2]]).unwrap()),
    );
    check(
        "norm_linears, weights alone",
        &[frozen.copy(), first.copy()],
        &|t| all(norm_linears(&x, Some(&more), &t[0], 1e-5, &[&t[1]]).unwrap()),
    );
    check("norm_linears, x alone goes on", &[x.copy(), more], &|t| {
        norm_linears(&t[0], Some(&t[1]), &frozen, 1e-5, &[first])
            .unwrap()
            .0
    });
}

#[test]
fn an_id_that_the_table_lacks() {
    let table = double(&[3, 2], 1.0);
    for ids in [[0i64, 3], [-1, 0]] {
        embedding(&table, &Tensor::from_slice(&ids)).unwrap_err();
    }
    let e = embedding(&table, &Tensor::from_slice(&[0i32])).unwrap_err();
    assert!(e.to_string().contains("expected [V, H] and i64 [n]"), "{e}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Gradients as libtorch's, repeated ids and none included, of small tables and of such as memory is saved for.
    #[test]
    fn embedding_as_libtorch_has_it(n in 0..200i64, width in 1..150i64, tall: bool, seed in 0..1000i64) {
        let rows = if tall { 9000 } else { 7 };
        let table = wave(&[rows, width], seed as f64, Kind::Float).set_requires_grad(true);
        let ids = (Tensor::arange(n, (Kind::Int64, table.device())) * (seed + 1)).remainder(rows / 3);
        let weights = wave(&[n, width], 2.0, Kind::Float);
        let run = |x: Tensor| {
            let loss = (&x * &weights).sum(Kind::Float);
            (x.detach(), Tensor::run_backward(&[loss], &[&table], false, false).remove(0))
        };
        let ours = run(embedding(&table, &ids).unwrap());
        let theirs = run(Tensor::embedding(&table, &ids, -1, false, false));
        prop_assert_eq!(ours.0, theirs.0);
        prop_assert!(largest_difference(&ours.1, &theirs.1) < 1e-5);
    }

    /// In f32, of any width, empty and strided, values and gradients.
    #[test]
    fn as_composed(n in 0..150i64, d in 1..80i64, heads in 1..4i64, pairs in 0..40i64, sums: bool) {
        let all = wave(&[n, 3 * d], 1.0, Kind::Float).set_requires_grad(true);
        let part = |i: i64| all.narrow(1, i * d, d);
        let w = wave(&[d], 2.0, Kind::Float).set_requires_grad(true);
        let turning = 2 * pairs.min(d / 2);
        let angle = wave(&[n, 1, turning], 3.0, Kind::Float) * 3.0;
        let (cos, sin) = (angle.cos(), angle.sin());
        let run = |norm: (Tensor, Tensor), silu: Tensor, turned: Tensor| {
            let loss = (&norm.0 * &norm.1).sum(Kind::Float) + silu.sin().sum(Kind::Float) + turned.square().sum(Kind::Float);
            let mut out = Tensor::run_backward(&[loss], &[&all, &w], false, false);
            out.extend([norm.0.detach(), norm.1.detach(), silu.detach(), turned.detach()]);
            out
        };
        let (x, y, z) = (part(0), part(1), part(2));
        let more = sums.then_some(&z);
        let wide = || all.view([n, 3, d]).repeat([1, heads, 1]);
        let ours = run(
            add_norm(&x, more, &w, 1e-5).unwrap(),
            silu_mul(&(&y * 9.0), &z).unwrap(),
            rotate(&wide(), &cos, &sin).unwrap(),
        );
        let plain = run(
            reference::add_norm(&x, more, &w, 1e-5),
            reference::silu_mul(&(&y * 9.0), &z),
            reference::rotate(&wide(), &cos, &sin),
        );
        for (a, b) in ours.iter().zip(&plain) {
            let scale = if b.numel() == 0 { 1.0 } else { b.abs().max().double_value(&[]).max(1.0) };
            prop_assert!(largest_difference(a, b) < 2e-5 * scale, "{}", largest_difference(a, b));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// The products with what comes before them, in f32, also strided and empty.
    #[test]
    fn products_as_composed(n in 0..150i64, d in 1..40i64, out in 1..30i64, sums: bool) {
        let all = wave(&[n, 3 * d], 1.0, Kind::Float).set_requires_grad(true);
        let leaf = |size: &[i64], seed| wave(size, seed, Kind::Float).set_requires_grad(true);
        let (norm, first, second, down) = (leaf(&[d], 2.0), leaf(&[out, d], 3.0), leaf(&[3, d], 4.0), leaf(&[out, d], 5.0));
        let part = |i: i64| all.narrow(1, i * d, d);
        let run = |(x, y): (Tensor, Vec<Tensor>), z: Tensor| {
            let loss = x.square().sum(Kind::Float) + (&y[0] * &z).sum(Kind::Float) + y[1].sin().sum(Kind::Float);
            let leaves = [&all, &norm, &first, &second, &down];
            let mut results = Tensor::run_backward(&[loss], &leaves, false, false);
            results.extend([x.detach(), y[0].detach(), y[1].detach(), z.detach()]);
            results
        };
        let more = part(2);
        let more = sums.then_some(&more);
        let weights = [&first, &second];
        let ours = run(
            norm_linears(&part(0), more, &norm, 1e-5, &weights).unwrap(),
            silu_mul_linear(&(part(1) * 9.0), &part(2), &down).unwrap(),
        );
        let plain = run(
            reference::norm_linears(&part(0), more, &norm, 1e-5, &weights),
            reference::silu_mul_linear(&(part(1) * 9.0), &part(2), &down),
        );
        for (a, b) in ours.iter().zip(&plain) {
            let scale = if b.numel() == 0 { 1.0 } else { b.abs().max().double_value(&[]).max(1.0) };
            prop_assert!(largest_difference(a, b) < 2e-5 * scale, "{}", largest_difference(a, b));
        }
    }
}

/// Size `[a, b]`, contiguous, as columns of a wider matrix, or transposed.
fn lying(way: usize, a: i64, b: i64, seed: f64) -> Tensor {
    match way {
        0 => wave(&[a, b], seed, Kind::Float),
        1 => wave(&[a, b + 3], seed, Kind::Float).narrow(1, 2, b),
        _ => wave(&[b, a], seed, Kind::Float).tr(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Products in f32 beside f64's, values and gradients: thinner than a tile and longer than a block in each of
    /// their sizes, empty, and of matrices that lie in any way.
    #[test]
    fn linears_of_any_size(
        n in prop_oneof![0..40i64, 200..700i64],
        d in prop_oneof![0..70i64, 500..1300i64],
        out in prop_oneof![0..70i64, 200..600i64],
        ways in prop::array::uniform3(0..3usize),
    ) {
        let run = |kind: Kind| {
            let leaf = |way, a, b, seed| lying(way, a, b, seed).to_kind(kind).detach().set_requires_grad(true);
            let (x, w, v) = (leaf(ways[0], n, d, 1.0), leaf(ways[1], out, d, 2.0), leaf(ways[1], 5, d, 3.0));
            let g = lying(ways[2], n, out, 4.0).to_kind(kind);
            let y = match kind {
                Kind::Float => linears(&x, &[&w, &v]).unwrap(),
                _ => vec![x.matmul(&w.tr()), x.matmul(&v.tr())],
            };
            let loss = (&y[0] * g).sum(kind) + y[1].sum(kind);
            let mut all = Tensor::run_backward(&[loss], &[&x, &w, &v], false, false);
            all.extend(y.iter().map(Tensor::detach));
            all
        };
        let most = 1e-5 * ((1 + n.max(d).max(out)) as f64).sqrt();
        for (i, (a, b)) in run(Kind::Float).iter().zip(&run(Kind::Double)).enumerate() {
            let off = largest_difference(a, b);
            prop_assert!(off < most, "{i}: {off}");
        }
    }

    /// A row's numbers do not depend on the rows beside it, nor on how many threads share the product.
    #[test]
    fn a_rows_product_is_its_own(n in 1..90i64, d in 1..1300i64, out in 1..400i64, at in 0..90i64) {
        if device() != Device::Cpu {
            return Ok(());
        }
        let (x, w) = (wave(&[n, d], 1.0, Kind::Float), wave(&[out, d], 2.0, Kind::Float));
        let row = x.narrow(0, at % n, 1);
        let product = |x: &Tensor, w: &Tensor| linears(x, &[w]).unwrap().remove(0);
        let all = product(&x, &w);
        prop_assert_eq!(all.narrow(0, at % n, 1), product(&row, &w));
        let few = out.min(1 + at);
        prop_assert_eq!(all.narrow(1, out - few, few), product(&x, &w.narrow(0, out - few, few)));
        let threads = tch::get_num_threads();
        tch::set_num_threads(1);
        let alone = product(&x, &w);
        tch::set_num_threads(threads);
        prop_assert_eq!(all, alone);
    }
}

#[test]
fn shapes_that_do_not_fit() {
    let t = |size: &[i64]| wave(size, 1.0, Kind::Float);
    let said = [
        add_norm(&t(&[2, 3]), None, &t(&[4]), 1e-5).unwrap_err(),
        add_norm(&t(&[2, 3]), Some(&t(&[1, 3])), &t(&[3]), 1e-5).unwrap_err(),
        silu_mul(&t(&[2, 3]), &t(&[2, 4])).unwrap_err(),
        rotate(&t(&[2, 1, 4]), &t(&[2, 1, 6]), &t(&[2, 1, 6])).unwrap_err(),
        rotate(&t(&[2, 1, 4]), &t(&[2, 1, 3]), &t(&[2, 1, 3])).unwrap_err(),
        linears(&t(&[2, 3]), &[&t(&[2, 4])]).unwrap_err(),
        silu_mul_linear(&t(&[2, 3]), &t(&[2, 3]), &t(&[2, 4])).unwrap_err(),
        norm_linears(&t(&[2, 3]), None, &t(&[4]), 1e-5, &[]).unwrap_err(),
        norm_linears(&t(&[2, 3]), None, &t(&[3]), 1e-5, &[&t(&[2, 4])]).unwrap_err(),
    ];
    for e in said {
        assert!(e.to_string().contains("expected"), "{e}");
    }
    // The type that the passes are not for is composed.
    let narrow = t(&[2, 3]).to_kind(Kind::BFloat16);
    let (x, y) = add_norm(&narrow, Some(&narrow), &narrow.get(0), 1e-5).unwrap();
    assert_eq!((x.kind(), y.kind()), (Kind::BFloat16, Kind::BFloat16));
    let (x, y) = norm_linears(&x, Some(&narrow), &narrow.get(0), 1e-5, &[&narrow]).unwrap();
    assert_eq!((x.kind(), y[0].kind()), (Kind::BFloat16, Kind::BFloat16));
    let y = silu_mul_linear(&narrow, &narrow, &narrow).unwrap();
    assert_eq!((y.kind(), y.size()), (Kind::BFloat16, vec![2, 2]));
}
