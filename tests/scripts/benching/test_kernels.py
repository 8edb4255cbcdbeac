"""Kernel time by class: names as they come from cuBLAS, cuDNN, FlashAttention, torch and Inductor."""

from types import SimpleNamespace

import pytest
import torch

from scripts.benching import kernels

NAMES = {
    "matmul": ["nvjet_hsh_192x192_64x4_2x1_v_bz_coopA_NNT", "ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_nn",
               "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>(Params)", "triton_tem_fused_addmm_gelu_3",
               "void cublasLt::splitKreduce_kernel<32, 16, int, float>(...)", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n"],
    "attention forward": ["cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_kernel0_0",
                          "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>(Flash_fwd_params)",
                          "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)"],
    "attention backward": ["cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_128x64x64_1x1x1_kernel0_0",
                           "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>(Flash_bwd_params)",
                           "void pytorch_flash::flash_bwd_dot_do_o_kernel<true>(...)",
                           "fmha_cutlassB_bf16_aligned_64x64_k64_dropout_sm80(...)",
                           "void cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16>(...)",
                           "void cudnn::fusion::convert_dq_to_16bits<true, __nv_bfloat16>(...)"],
    "cross-entropy, softmax": ["triton_red_fused__log_softmax__to_copy_nll_loss_forward_11",
                               "triton_red_fused__log_softmax_backward_data__to_copy_nll_loss_backward_12",
                               "void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, float, LogSoftMaxForward>(...)",
                               "void at::native::(anonymous namespace)::nll_loss_forward_reduce_cuda_kernel_2d<float>(...)"],
    "LayerNorm": ["triton_per_fused_add_native_layer_norm_native_layer_norm_backward_7",
                  "triton_per_fused__to_copy_add_embedding_native_layer_norm_view_0",
                  "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>(...)",
                  "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float>(...)"],
    "GELU": ["triton_poi_fused_addmm_gelu_view_6", "triton_poi_fused_gelu_gelu_backward_9",
             "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(at::TensorIteratorBase&)>(...)"],
    "elementwise": ["triton_poi_fused_add_4", "triton_red_fused__to_copy_sum_20",
                    "triton_poi_fused__scaled_dot_product_cudnn_attention_backward_cat_3",
                    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>(...)",
                    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float>>>(...)"],
    "optimizer, clipping": [
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4, ADAM_MODE>>(...)",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<LpNormFunctor<float, NormType::L2>>(...)"],
    "copies": ["triton_poi_fused__to_copy_12", "triton_poi_fused__to_copy_t_view_1", "Memcpy HtoD (Pinned -> Device)",
               "Memset (Device)", "void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda(at::TensorIterator&)>"],
    "other": ["void cub::DeviceScanKernel<...>"],
    kernels.REDUCTION: ["ncclDevKernel_AllReduce_Sum_bf16_RING_LL"],
}


@pytest.mark.parametrize("found, name", [(found, name) for found, names in NAMES.items() for name in names])
def test_the_class_follows_from_the_name(found, name):
    assert kernels.kernel_class(name) == found


def test_classes_are_those_that_exist():
    assert set(NAMES) == set(kernels.CLASSES)


def test_times_and_launches_are_of_a_step_and_sum_up():
    names = ["triton_poi_fused_add_4", "Memset (Device)", "nvjet_hsh_a", "nvjet_hsh_b"]
    found = kernels.tally([(name, us) for us in (1000.0, 3000.0) for name in names], steps=2)
    assert found["ms"] == 8 and found["launches"] == 4
    assert found["classes"]["matmul"] == {"ms": 4, "launches": 2} and found["classes"]["GELU"] == {"ms": 0, "launches": 0}
    assert [one["ms"] for one in found["largest"]] == [2] * 4
    page = kernels.by_class({"A, 8": found, "B, 8": kernels.tally([], 1)})
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()]
    assert cells[0] == ["kernels, ms a step", "A, 8", "B, 8"] and ["matmul", "4.00", "0.00"] in cells
    assert cells[-2:] == [["all kernels", "8.00", "0.00"], ["launches a step", "4", "0"]]


def test_only_what_ran_on_the_gpu_counts():
    """Neither the host's operations nor a range that is marked on the GPU, which holds kernels that count themselves."""
    def event(name, kind, us, marked=False):
        return SimpleNamespace(name=name, device_type=getattr(torch.autograd.DeviceType, kind), is_user_annotation=marked,
                               time_range=SimpleNamespace(elapsed_us=lambda: us))

    events = [event("nvjet_a", "CUDA", 5.0), event("cudaLaunchKernel", "CPU", 9.0),
              event("Optimizer.step#AdamW.step", "CUDA", 7.0, True)]
    assert kernels.kernels_of(events) == [("nvjet_a", 5.0)]
