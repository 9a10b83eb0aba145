/* Runs a SavedModel through TensorFlow's C API, in a process without Python.

   Reads a script from standard input, one command a line:

     library PATH          registers the ops of a shared object
     model PATH            loads a SavedModel with the tag "serve"
     read PATH             reads tensors into variables
     run FEED=VARIABLE ... -> VARIABLE=FETCH ...
                           runs a part of the graph; FEED and FETCH are
                           tensors of it, such as serve_x:0
     write PATH VARIABLE ...
                           writes variables
     kernels PATH          writes the registered kernels, a KernelList message

   A file of tensors is, for each, a line "NAME DTYPE RANK DIM ..." with the
   number of a TF_DataType, then its bytes as they lie in memory; of strings,
   each is a line with its length, then its bytes. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tensorflow/c/c_api.h"

#define MOST 64

struct variable {
  char name[128];
  TF_Tensor *tensor;
};

static struct variable *variables;
static int variable_count, variable_room;
static TF_Status *status;
static TF_Graph *graph;
static TF_Session *session;

static void fail(const char *what, const char *detail) {
  fprintf(stderr, "host: %s: %s\n", what, detail);
  exit(1);
}

static void check(const char *what) {
  if (TF_GetCode(status) != TF_OK) fail(what, TF_Message(status));
}

static FILE *open_file(const char *path, const char *mode) {
  FILE *file = path ? fopen(path, mode) : NULL;
  if (!file) fail("cannot open", path ? path : "(no path)");
  return file;
}

static TF_Tensor *get(const char *name) {
  for (int i = variable_count - 1; i >= 0; i--)
    if (!strcmp(variables[i].name, name)) return variables[i].tensor;
  fail("no such variable", name);
  return NULL;
}

static void set(const char *name, TF_Tensor *tensor) {
  for (int i = variable_count - 1; i >= 0; i--)
    if (!strcmp(variables[i].name, name)) {
      TF_DeleteTensor(variables[i].tensor);
      variables[i].tensor = tensor;
      return;
    }
  if (variable_count == variable_room) {
    variable_room = 2 * variable_room + 16;
    variables = realloc(variables, variable_room * sizeof *variables);
    if (!variables) fail("out of memory", name);
  }
  snprintf(variables[variable_count].name, 128, "%s", name);
  variables[variable_count++].tensor = tensor;
}

static void read_bytes(void *into, size_t size, FILE *file) {
  if (fread(into, 1, size, file) != size) fail("tensor file", "is cut short");
}

static void read_tensors(const char *path) {
  FILE *file = open_file(path, "rb");
  char name[128];
  int dtype, rank;
  while (fscanf(file, "%127s %d %d", name, &dtype, &rank) == 3) {
    int64_t dims[8], count = 1;
    if (rank > 8) fail("rank above 8", name);
    for (int i = 0; i < rank; i++) {
      long long dim;
      if (fscanf(file, "%lld", &dim) != 1) fail("bad header", name);
      dims[i] = dim;
      count *= dim;
    }
    fgetc(file);
    size_t size = count * TF_DataTypeSize(dtype);
    if (dtype == TF_STRING) size = count * sizeof(TF_TString);
    TF_Tensor *tensor = TF_AllocateTensor(dtype, dims, rank, size);
    if (!tensor) fail("cannot allocate", name);
    if (dtype != TF_STRING) {
      read_bytes(TF_TensorData(tensor), size, file);
    } else {
      TF_TString *strings = TF_TensorData(tensor);
      for (int64_t i = 0; i < count; i++) {
        size_t length;
        if (fscanf(file, "%zu", &length) != 1) fail("bad length", name);
        fgetc(file);
        char *bytes = malloc(length + 1);
        read_bytes(bytes, length, file);
        TF_StringInit(&strings[i]);
        TF_StringCopy(&strings[i], bytes, length);
        free(bytes);
      }
    }
    set(name, tensor);
  }
  fclose(file);
}

static void write_tensor(FILE *file, const char *name) {
  TF_Tensor *tensor = get(name);
  int rank = TF_NumDims(tensor);
  if (TF_TensorType(tensor) == TF_STRING) fail("cannot write strings", name);
  fprintf(file, "%s %d %d", name, TF_TensorType(tensor), rank);
  for (int i = 0; i < rank; i++)
    fprintf(file, " %lld", (long long)TF_Dim(tensor, i));
  fputc('\n', file);
  fwrite(TF_TensorData(tensor), 1, TF_TensorByteSize(tensor), file);
}

static void load(const char *path) {
  const char *tags[] = {"serve"};
  TF_SessionOptions *options = TF_NewSessionOptions();
  graph = TF_NewGraph();
  session = TF_LoadSessionFromSavedModel(options, NULL, path, tags, 1, graph,
                                         NULL, status);
  check("cannot load the model");
  TF_DeleteSessionOptions(options);
}

static TF_Output find(char *name) {
  char *colon = strrchr(name, ':');
  if (!colon) fail("a tensor must be OPERATION:INDEX", name);
  *colon = 0;
  TF_Output output = {TF_GraphOperationByName(graph, name), atoi(colon + 1)};
  if (!output.oper) fail("no such operation", name);
  return output;
}

static void run(void) {
  TF_Output feeds[MOST], fetches[MOST];
  TF_Tensor *inputs[MOST], *outputs[MOST];
  char *names[MOST], *word;
  int fed = 0, fetched = 0, arrow = 0;
  if (!session) fail("run", "before model");
  while ((word = strtok(NULL, " \n"))) {
    if (!strcmp(word, "->")) {
      arrow = 1;
      continue;
    }
    char *right = strchr(word, '=');
    if (!right || fed == MOST || fetched == MOST) fail("bad run", word);
    *right++ = 0;
    if (arrow) {
      names[fetched] = word;
      fetches[fetched++] = find(right);
    } else {
      feeds[fed] = find(word);
      inputs[fed++] = get(right);
    }
  }
  TF_SessionRun(session, NULL, feeds, inputs, fed, fetches, outputs, fetched,
                NULL, 0, NULL, status);
  check("cannot run");
  for (int i = 0; i < fetched; i++) set(names[i], outputs[i]);
}

static void write_kernels(const char *path) {
  FILE *file = open_file(path, "wb");
  TF_Buffer *kernels = TF_GetAllRegisteredKernels(status);
  check("cannot list kernels");
  fwrite(kernels->data, 1, kernels->length, file);
  TF_DeleteBuffer(kernels);
  fclose(file);
}

int main(void) {
  char *line = NULL;
  size_t room = 0;
  status = TF_NewStatus();
  while (getline(&line, &room, stdin) > 0) {
    char *command = strtok(line, " \n");
    if (!command) continue;
    if (!strcmp(command, "library")) {
      TF_LoadLibrary(strtok(NULL, "\n"), status);
      check("cannot load the library");
    } else if (!strcmp(command, "model")) {
      load(strtok(NULL, "\n"));
    } else if (!strcmp(command, "read")) {
      read_tensors(strtok(NULL, "\n"));
    } else if (!strcmp(command, "run")) {
      run();
    } else if (!strcmp(command, "write")) {
      FILE *file = open_file(strtok(NULL, " \n"), "wb");
      char *name;
      while ((name = strtok(NULL, " \n"))) write_tensor(file, name);
      fclose(file);
    } else if (!strcmp(command, "kernels")) {
      write_kernels(strtok(NULL, "\n"));
    } else {
      fail("no such command", command);
    }
  }
  free(line);
  return 0;
}
