namespace sparsefx {
extern const Kernel kernel_0;
extern const Kernel kernel_1;
extern const Kernel kernel_2;
extern const Kernel kernel_3;
extern const Kernel kernel_4;
extern const Kernel kernel_5;
extern const Kernel kernel_6;
extern const Kernel kernel_7;
extern const Kernel kernel_8;
extern const Kernel kernel_9;
}
static bool has_avx512_fp16() { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512fp16") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma"); }
static bool has_avx512_vnni() { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma"); }
static bool has_avx512() { return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma"); }
static bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma"); }
static bool has_portable() { return true; }
static const std::vector<Choice> CHOICES = {
    {has_avx512_fp16, &sparsefx::kernel_0},
    {has_avx512_fp16, &sparsefx::kernel_1},
    {has_avx512_vnni, &sparsefx::kernel_2},
    {has_avx512_vnni, &sparsefx::kernel_3},
    {has_avx512, &sparsefx::kernel_4},
    {has_avx512, &sparsefx::kernel_5},
    {has_avx2, &sparsefx::kernel_6},
    {has_avx2, &sparsefx::kernel_7},
    {has_portable, &sparsefx::kernel_8},
    {has_portable, &sparsefx::kernel_9},
};
