//! The device that tests run on; several crates' tests share this.

use tch::{Device, Tensor};

/// The CPU, or with `RLHF_TEST_DEVICE=cuda` the first GPU.
pub(crate) fn device() -> Device {
    match std::env::var("RLHF_TEST_DEVICE").as_deref() {
        Err(_) | Ok("cpu") => Device::Cpu,
        Ok("cuda") => {
            rlhf_kernels::load_cuda();
            assert!(tch::Cuda::is_available(), "no CUDA device");
            Device::Cuda(0)
        }
        Ok(other) => panic!("RLHF_TEST_DEVICE={other}: expected cpu or cuda"),
    }
}

/// [`Tensor::from_slice`] on that device.
pub(crate) fn from_slice<T: tch::kind::Element>(values: &[T]) -> Tensor {
    // Asking for CUDA comes before the first tensor.
    let device = device();
    Tensor::from_slice(values).to_device(device)
}
