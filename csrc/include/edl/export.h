#pragma once

// Marks what a C++ program may call. Everything else stays inside libedl.
#if defined(_WIN32)
#define EDL_API __declspec(dllexport)
#else
#define EDL_API __attribute__((visibility("default")))
#endif
